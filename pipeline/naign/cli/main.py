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
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tyro

from naign import find_version
from naign.cli.cluster import doctor, fetch, launch, render, train
from naign.cli.data import index, pack, verify
from naign.cli.model import demo, evaluate, export, restore, sample, score
from naign.cli.neighbours import copies
from naign.errors import FULL, InputError, check_address, exit_on_input_error, one_line, unwritten

ABOUT = "Non-adversarial idempotent generative networks: one network that generates and repairs. --version: print it."
COMMANDS: dict[str, Callable[..., None]] = {
    "pack": pack,
    "index": index,
    "verify": verify,
    "train": train,
    "launch": launch,
    "render": render,
    "fetch": fetch,
    "evaluate": evaluate,
    "copies": copies,
    "sample": sample,
    "restore": restore,
    "score": score,
    "export": export,
    "demo": demo,
    "doctor": doctor,
}
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # errors of torch on a CPU, on a GPU


def main() -> None:
    """Run the command in sys.argv. Exit codes are those of pipeline/naign/errors.py."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115  # of >&-
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        with exit_on_input_error("naign"), _described():
            try:
                _run(sys.argv[1:])
            finally:
                sys.stdout.flush()  # also after --help, which exits
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)


def _run(words: list[str]) -> None:
    launches = words[:1] in (["train"], ["launch"])
    for number, word in enumerate(words):
        check_address(word)
        before = words[number - 1]
        is_setting = launches and "." in f"{before}{word}"  # whose text may be empty
        empty = not word or word.startswith("--") and word.endswith("=")
        if empty and not is_setting:
            raise InputError(f"'' is not a value (after {word or before}): give one, or leave that option out")
    if launches:  # both pass unknown options on to the training program
        COMMANDS[words[0]]()
    elif words == ["--version"]:
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
    except BrokenPipeError:
        raise
    except OSError as error:
        text = error.strerror or one_line(error)
        if error.errno in FULL and not error.filename:
            _discard_output()
            text = f"the output: {text}"
        if error.filename:
            text = f"{error.filename}: {text}: check the path, or choose another"
        raise unwritten(text) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
            raise InputError("there is too little memory for that: ask for fewer or smaller ones") from None
        raise


def _discard_output() -> None:
    """Drop what is left in stdout's buffer: the flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
