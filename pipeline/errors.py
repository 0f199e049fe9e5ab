"""What a program says and returns when the fault is the user's, not ours."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FAILED = 1
"""Exit code: a failure that is worth a retry."""

BAD_INPUT = 2
"""Exit code: bad configuration or input. An orchestrator must not retry it."""

INTERRUPTED = 75
"""Exit code: stopped on request after writing a checkpoint. An orchestrator should retry it."""


class InputError(ValueError):
    """Bad configuration or input: the message says what is wrong, where, and what to do about it."""


class Conflict(InputError):
    """Two programs write to one place: what is there is not ours to take back."""


class Unavailable(Exception):
    """A store that stayed out of reach through all retries: nobody's mistake, and worth starting again."""


class Stopped(Exception):
    """All ranks agreed to stop here: not a failure."""


@contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Turn an InputError into one readable message on stderr and exit code 2, Unavailable into one and 1.

    Anything else is a crash.
    """
    try:
        yield
    except Unavailable as error:
        print(f"{program}: failed: {error}", file=sys.stderr, flush=True)
        raise SystemExit(FAILED) from None
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
