"""`python -m pipeline.cli`: the `naign` program."""

from pipeline.cli.main import main

main()
