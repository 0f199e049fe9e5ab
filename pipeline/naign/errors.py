"""Errors that the user or the environment causes: what a program says of them, and the exit code it returns."""

import errno
import json
import os
import re
import reprlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import NoReturn


class Outcome(IntEnum):
    """How a program ends: its exit code. Any other code is a crash, as FAILED is."""

    DONE = 0
    FAILED = 1  # worth a retry, which an orchestrator counts
    BAD_INPUT = 2  # bad configuration or input, which an orchestrator must not retry
    INTERRUPTED = 75  # stopped on request after writing a checkpoint, which an orchestrator should retry
    PEER_LOST = 76  # another rank, or a store, is gone, which an orchestrator should retry, and not count


FAILED = Outcome.FAILED
BAD_INPUT = Outcome.BAD_INPUT
INTERRUPTED = Outcome.INTERRUPTED
PEER_LOST = Outcome.PEER_LOST
DONE = Outcome.DONE


class InputError(ValueError):
    """Bad configuration or input: the message says what is wrong, where, and what to do about it."""

    code = BAD_INPUT
    kind = "error: "  # what a program's message begins with


class Damaged(InputError):
    """Stored data does not match its checksum or manifest."""


class Conflict(InputError):
    """Another program writes to the same place, and what it wrote must not be overwritten."""


class Diverged(InputError):
    """The training diverged: its numbers are not finite any more."""

    kind = "diverged: "


class Unavailable(Exception):
    """A store stayed out of reach through all retries: nobody's mistake, and worth a restart."""

    code = FAILED
    kind = "failed: "


class StoreLost(Unavailable):
    """A store that has answered before stayed out of reach, or refuses what it granted: a loss, as of another rank."""

    code = PEER_LOST


class PeerLost(Exception):
    """Another rank is gone, so all have to start again."""

    code = PEER_LOST
    kind = ""


class Gone(PeerLost):
    """Stored data that this run has read is gone, so all have to start again: from it, or without it."""


class Stopped(Exception):
    """All ranks agreed to stop here: not a failure."""

    code = INTERRUPTED


# The errors that one rank raises on behalf of all (`together` raises them on every rank), and the exit codes, the most
# specific first: where ranks raise different errors, the first of these wins.
SHARED = (InputError, Damaged, Conflict, Diverged, Stopped, PeerLost, Gone, Unavailable, StoreLost)
BY_WEIGHT = (BAD_INPUT, INTERRUPTED, PEER_LOST, FAILED)

# Failures of a disk or system that may pass, which are worth a retry: it is full, or fails for a while.
FULL = {errno.ENOSPC, errno.EDQUOT}
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def printable(text: str, most: int = 200) -> str:
    """Untrusted `text` for a message: shortened, without control characters."""
    return "".join(letter if letter.isprintable() else "_" for letter in text[:most])


def one_line(error: object, most: int = 300) -> str:
    """Another library's error on one line, at most its last `most` characters; URLs lose user, password, query."""
    text = re.sub(r"://\S*@", "://...@", " ".join(str(error).split()))
    text = re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]*", r"\1...", text)
    if len(text) > most:
        end = text[4 - most :]
        text = "... " + (end.partition(" ")[2] or end)
    return printable(text, most)


def shown(value: object) -> str:
    """A value of a file for a message, shortened. Python refuses to write an integer of thousands of digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a number of too many digits"


def bytes_in_words(count: int) -> str:
    """A size for a message, to one decimal: 1.0 GB is 1e9 bytes."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB"


def require(*rules: tuple[object, str]) -> None:
    """InputError with the message of the first rule (whether it holds, its message) that does not hold."""
    for holds, message in rules:
        if not holds:
            raise InputError(message)


def check_address(text: str) -> None:
    """InputError, which does not show it, for an address with a user, password or query; `?` may match tars' names."""
    mark = re.search(r"\b(s3|gs|az|abfss?|https?|hf)(?=:)|(?=:/)", text)
    if not mark:
        return
    scheme = text[: mark.end()]
    rest = text[mark.end() + 1 :]
    query = rest.partition("?")[2]
    host = rest.strip("/").partition("/")[0]
    has_query = "=" in query or query[-4:] not in ("", ".tar")
    has_user = "@" in host and "abfs" not in scheme
    if has_query or has_user:
        holds = "a user or a password, or a query, which messages would show"
        raise InputError(f"{scheme}://: the address holds {holds}: give that of a folder, without them")


def unwritten(message: str) -> InputError | Unavailable:
    """The error of what could not be written: Unavailable where a restart may help, by the system's words in it."""
    if any(os.strerror(number) in message for number in FULL | TRANSIENT):
        return Unavailable(message)
    return InputError(message)


@contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Print an error that is not a crash, or a full disk, on one line and exit with its code; on Ctrl-C with 130."""
    try:
        yield
    except (InputError, PeerLost, Unavailable) as error:
        _exit(error.code, f"{program}: {error.kind}{error}")
    except OSError as error:
        if error.errno not in FULL:
            raise
        _exit(FAILED, f"{program}: failed: {error}: free some space, or name another folder by TMPDIR")
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT, f"{program}: interrupted")


def _exit(code: int, text: str) -> NoReturn:
    """Print the reason, pass it on, and exit."""
    print(text, file=sys.stderr, flush=True)
    pass_on(text)
    raise SystemExit(code) from None


def pass_on(text: str) -> None:
    """Pass the reason of this rank's end to torchelastic, if that started it, for the last line of the launcher."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))
