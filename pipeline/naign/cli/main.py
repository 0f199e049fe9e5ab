"""The `naign` program. Each command is a function, which imports heavy modules when it is called."""

# ruff: noqa: E402

import signal
import sys
from typing import NoReturn

from naign.process import leave_when_asked


def _end(number: int, _: object) -> NoReturn:
    """End the command, and remove what it has written in part."""
    raise SystemExit(128 + number)


# Before all other imports: a container's first process ignores signals without a handler.
if sys.argv[1:2] in (["train"], ["launch"]):
    leave_when_asked(f"naign {sys.argv[1]}: stopped on request, before it began")
else:
    signal.signal(signal.SIGTERM, _end)

import io
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import tyro

from naign import find_version
from naign.cli.cluster import doctor, fetch, launch, render, train
from naign.cli.data import index, pack, verify
from naign.cli.model import demo, evaluate, export, push, restore, sample, score
from naign.cli.neighbours import copies, duplicates
from naign.cli.runs import compare, runs
from naign.errors import InputError, Unavailable, check_address, exit_on_input_error
from naign.storage import local

ABOUT = "Non-adversarial idempotent generative networks: one network that generates and repairs. --version: print it."
_OF_DATA: tuple[Callable[..., None], ...] = (pack, index, verify, duplicates)
_OF_RUNS: tuple[Callable[..., None], ...] = (train, launch, render, fetch, runs, compare)
_OF_MODELS: tuple[Callable[..., None], ...] = (evaluate, copies, sample, restore, score, export, push, demo, doctor)
COMMANDS = {command.__name__: command for command in (*_OF_DATA, *_OF_RUNS, *_OF_MODELS)}
# Options of a path.
PATHS = ("--to", "--root", "--config", "--labels", "--dry-run", "--data", "--run", "--drop", "--mask")
FLAGS = ("--json", "--map", "--force", "--private", "--keep-broken")  # options without a value, which a path may follow
FULL = ("can't allocate memory", "out of memory")  # errors of torch on a CPU, on a GPU


def main() -> None:
    """Run the command in sys.argv. Exit codes are those of pipeline/naign/errors.py."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # noqa: SIM115  # of >&-
    try:
        with exit_on_input_error("naign"), _described(), ExitStack() as end:
            end.callback(sys.stdout.flush)  # also after --help, which exits
            _run()
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        sys.exit(128 + signal.SIGPIPE)


def _run() -> None:
    for before, word in itertools.pairwise(sys.argv):
        check_address(word)
        empty = not word and (not before.startswith("--") or before.replace("_", "-") in PATHS + FLAGS)
        if empty or word.endswith("=") and word[:-1] in PATHS:
            raise InputError(f"'' is no path (after {word or before}): give a file, a folder or an address")
    if sys.argv[1:2] in (["train"], ["launch"]):  # these pass unknown options on to the training program
        (train if sys.argv[1] == "train" else launch)()
    elif sys.argv[1:] == ["--version"]:
        print(f"naign {find_version()}")
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot encode
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="naign", description=ABOUT)


@contextmanager
def _described() -> Iterator[None]:
    """Raise what the system or memory refuses as an InputError or Unavailable of one sentence."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in local.FULL:
            raise
        if error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        kind = Unavailable if error.errno in local.FULL | local.TRANSIENT else InputError
        taken = isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError)
        remedy = ": choose another path" if taken else ": check the path" * isinstance(error, FileNotFoundError)
        raise kind(f"{error.filename or 'the output'}: {error.strerror}{remedy}") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in FULL):
            raise InputError("there is too little memory for that: ask for fewer or smaller ones") from None
        raise
