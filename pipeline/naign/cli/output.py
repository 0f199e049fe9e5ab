"""What commands print: lines for people, or with --json one JSON document on stdout and all else on stderr."""

import contextlib
import json
import sys
from contextlib import AbstractContextManager
from typing import Annotated, Any

import tyro

Json = Annotated[bool, tyro.conf.arg(help="Print one JSON document instead, and nothing else on stdout.")]


def lines_to_stderr(wanted: bool) -> AbstractContextManager[Any]:
    """While a document is made, what is printed goes to stderr."""
    if wanted:
        return contextlib.redirect_stdout(sys.stderr)
    return contextlib.nullcontext()


def print_json(document: Any) -> None:
    """Print one JSON document. Paths become text; NaN and infinity, which JSON lacks, raise ValueError."""
    print(json.dumps(document, indent=1, allow_nan=False, default=str))
