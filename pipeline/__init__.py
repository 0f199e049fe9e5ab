"""NAIGN: non-adversarial idempotent generative networks, trained at scale."""

import os
from pathlib import Path

# Set before torch loads OpenMP: waiting threads sleep instead of spinning. On an idle machine this costs nothing.
# Beside one other busy process, training on two cores ran 6 times as fast (450 against 67 images/s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before the first product on a GPU: cuBLAS then sums in the same order each time (distributed/connect.py, repeat_bits).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Before torch loads: its store and sockets log a stack of 20 lines for each rank that they lose.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_PACKAGE = Path(__file__).resolve().parent


def shipped(path: str) -> Path:
    """Where a file of configs/, launch/, k8s/ or models/ would lie: beside this package, or inside it in a wheel."""
    inside = _PACKAGE / path
    return inside if (_PACKAGE / Path(path).parts[0]).is_dir() else _PACKAGE.parent / path


def find_version() -> str:
    """The installed version of naign. Imports when it is called: a program sets its handlers before."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("naign")
    except PackageNotFoundError:
        return "0+checkout"  # that was never installed
