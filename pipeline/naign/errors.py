"""Errors that the user or the environment causes, their exit codes, and how a rank leaves with one."""

import ctypes
import errno
import json
import os
import re
import reprlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

FAILED = 1  # exit code: a failure that is worth a retry
BAD_INPUT = 2  # exit code: bad configuration or input, which an orchestrator must not retry
INTERRUPTED = 75  # exit code: stopped on request after writing a checkpoint, which an orchestrator should retry
PEER_LOST = 76  # exit code: another rank, or a store, is gone, which an orchestrator should retry, and not count

# Requests to end, which a launcher forwards to its ranks; Slurm's is USR1.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


class InputError(ValueError):
    """Bad configuration or input: the message says what is wrong, where, and what to do about it."""

    code: ClassVar[int] = BAD_INPUT


class Damaged(InputError):
    """Stored data does not match its checksum or manifest."""


class Conflict(InputError):
    """Another program writes to the same place, and what it wrote must not be overwritten."""


class Diverged(InputError):
    """The training diverged: its numbers are not finite any more."""


class Unavailable(Exception):
    """A store stayed out of reach through all retries: nobody's mistake, and worth a restart."""

    code: ClassVar[int] = FAILED


class StoreLost(Unavailable):
    """A store that has answered before stayed out of reach, or refuses what it granted: a loss, as of another rank."""

    code: ClassVar[int] = PEER_LOST


class PeerLost(Exception):
    """Another rank is gone, so all have to start again."""

    code: ClassVar[int] = PEER_LOST


class Gone(PeerLost):
    """Stored data that this run has read is gone, so all have to start again: from it, or without it."""


class Stopped(Exception):
    """All ranks agreed to stop here: not a failure."""

    code: ClassVar[int] = INTERRUPTED


# The errors that one rank raises on behalf of all (`together` raises them on every rank), and the exit codes, the most
# specific first: where ranks raise different errors, the first of these wins.
SHARED = (InputError, Damaged, Conflict, Diverged, Stopped, PeerLost, Gone, Unavailable, StoreLost)
BY_WEIGHT = (BAD_INPUT, INTERRUPTED, PEER_LOST, FAILED)


def printable(text: str, most: int = 200) -> str:
    """Untrusted `text` for a message: shortened, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


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
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def require(*rules: tuple[object, str]) -> None:
    """InputError with the message of the first rule (whether it holds, its message) that does not hold."""
    for holds, message in rules:
        if not holds:
            raise InputError(message)


def check_address(text: str) -> None:
    """InputError, which does not show it, for an address with a user, password or query; `?` may match tars' names."""
    mark = re.search(r"\b(s3|gs|az|abfss?|https?|hf)(?=:)|(?=:/)", text)
    scheme, rest = (text[: mark.end()], text[mark.end() + 1 :]) if mark else ("", "")
    query, host = rest.partition("?")[2], rest.strip("/").partition("/")[0]
    secret = ("=" in query or query[-4:] not in ("", ".tar")) or ("@" in host and "abfs" not in scheme)
    holds = "a user or a password, or a query, which messages would show"
    require((not secret, f"{scheme}://: the address holds {holds}: give that of a folder, without them"))


def unwritten(message: str) -> InputError | Unavailable:
    """The error of what could not be written: Unavailable where a disk or quota is full, so that a restart may help."""
    full = any(os.strerror(number) in message for number in (errno.ENOSPC, errno.EDQUOT))
    return (Unavailable if full else InputError)(message)


@contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Print InputError, Unavailable and PeerLost as one line on stderr and exit with their code; on Ctrl-C with 130."""
    try:
        yield
    except (InputError, PeerLost, Unavailable) as error:
        kinds = {Diverged: "diverged: ", InputError: "error: ", Unavailable: "failed: "}
        kind = next((text for base, text in kinds.items() if isinstance(error, base)), "")
        _exit(error.code, f"{program}: {kind}{error}")
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


def record_exit(code: int) -> None:
    """Record this rank's exit code for `naign launch`."""
    if folder := os.environ.get("NAIGN_ENDINGS"):
        (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(str(code))


def leave(code: int) -> NoReturn:
    """Exit without interpreter shutdown, which aborts and hides `code` where a thread still waits for gloo's store."""
    record_exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def leave_on_failure() -> Iterator[None]:
    """Leave with the code of a SystemExit, or with 1 after the traceback of any other error."""
    try:
        yield
    except SystemExit as error:
        if error.code:
            leave(error.code if isinstance(error.code, int) else FAILED)
    except BaseException:
        traceback.print_exc()
        leave(FAILED)


def leave_when_asked(text: str = "") -> None:
    """Leave with 75, and `text` on stderr, at any of SIGNALS, and when the launcher dies (Linux), until
    `distributed.StopRequest` or `naign launch` handles signals.
    """

    def asked(*_: object) -> NoReturn:
        if text:
            print(text, file=sys.stderr)
        leave(INTERRUPTED)

    die_with_launcher(signal.SIGKILL)
    on_signals(asked)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked while `naign launch` became this process


def die_with_launcher(number: signal.Signals) -> None:
    """Have Linux send this process the signal when its launcher dies, unless `naign launch` became this process."""
    launcher = int(os.environ.get("NAIGN_LAUNCHER", os.getppid()))
    if sys.platform != "linux" or "ACCELERATE_MIXED_PRECISION" not in os.environ or launcher == os.getpid():
        return
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:  # it died before that call
        leave(INTERRUPTED)


def on_signals(handler: Callable[..., Any] | signal.Handlers) -> None:
    """Handle all of SIGNALS by `handler`; SIGHUP stays ignored where it is, as under nohup."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
