"""What a program says and returns when the fault is the user's, not ours."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

FAILED = 1
"""Exit code: a failure that is worth a retry."""

BAD_INPUT = 2
"""Exit code: bad configuration or input. An orchestrator must not retry it."""

INTERRUPTED = 75
"""Exit code: stopped on request after writing a checkpoint. An orchestrator should retry it."""


PEER_LOST = 76
"""Exit code: another rank is gone, through no fault of this one. An orchestrator should retry it, and not count it."""


class InputError(ValueError):
    """Bad configuration or input: the message says what is wrong, where, and what to do about it."""


class Damaged(InputError):
    """What was written is not what is there."""


class Conflict(InputError):
    """Two programs write to one place: what is there is not ours to take back."""


class Diverged(InputError):
    """The training broke down: its numbers are not finite any more."""


class Unavailable(Exception):
    """A store that stayed out of reach through all retries: nobody's mistake, and worth starting again."""


class PeerLost(Exception):
    """Another rank is gone: all have to start again."""


class Stopped(Exception):
    """All ranks agreed to stop here: not a failure."""


def printable(text: str, most: int = 200) -> str:
    """What a stranger wrote, so that it may stand in a message."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


@contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Turn an InputError into one readable message on stderr and exit code 2, Unavailable into one and 1, PeerLost 76.

    Anything else is a crash.
    """
    try:
        yield
    except Unavailable as error:
        _leave(FAILED, f"{program}: failed: {error}")
    except PeerLost as error:
        _leave(PEER_LOST, f"{program}: {error}")
    except Diverged as error:
        _leave(BAD_INPUT, f"{program}: diverged: {error}")
    except InputError as error:
        _leave(BAD_INPUT, f"{program}: error: {error}")
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT, f"{program}: interrupted")


def _leave(code: int, text: str) -> NoReturn:
    """Say why, also to a launcher that asks for it (torchelastic), and end."""
    print(text, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))
    raise SystemExit(code) from None
