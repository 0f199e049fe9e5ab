"""The `naign` program. Nothing else imports from here but its entry point, `naign.cli.main:main`."""
