"""The `naign` program. Nothing else imports from here but its entry point, `pipeline.cli.main:main`."""
