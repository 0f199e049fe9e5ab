"""What `top -H` and `ps -L` show of a rank: the name of each thread says what it is doing."""

import ctypes
import sys
from typing import Any

_PR_SET_NAME = 15  # linux/prctl.h; at most 15 bytes

_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def title(text: str) -> None:
    """Name the calling thread `naign <text>`, where the system is Linux."""
    if _libc is not None:
        _libc.prctl(_PR_SET_NAME, f"naign {text}".encode()[:15], 0, 0, 0)
