"""NAIGN: non-adversarial idempotent generative networks, trained at scale."""

import os
from importlib.metadata import PackageNotFoundError, version

# Set before torch loads OpenMP: waiting threads sleep instead of spinning. On an idle machine this costs nothing.
# Beside one other busy process, training on two cores ran 6 times as fast (450 against 67 images/s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before the first product on a GPU: cuBLAS then sums in the same order each time (distributed/ranks.py, repeat_bits).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

try:
    __version__ = version("naign")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+checkout"
