"""`python -m naign.cli`: the `naign` program."""

from naign.cli.main import main

main()
