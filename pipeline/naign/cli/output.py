"""What commands print: lines for people, or with --json one JSON document on stdout and all else on stderr."""

import contextlib
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import tyro

Json = Annotated[bool, tyro.conf.arg(help="Print one JSON document instead, and nothing else on stdout.")]


def lines_to_stderr(wanted: bool) -> AbstractContextManager[Any]:
    """While a document is made, what is printed goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def print_json(document: Any) -> None:
    """Print one JSON document. Paths become text; NaN and infinity, which JSON lacks, raise ValueError."""
    print(json.dumps(document, indent=1, allow_nan=False, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for name, *cells in (header, *rows):
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip())
