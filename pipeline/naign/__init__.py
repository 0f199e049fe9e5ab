"""NAIGN: non-adversarial idempotent generative networks, trained at scale.

    from naign import NAIGN, ShardedIndex, gopen, nearest, open_dataset

These are a trained model, an index of rows on many ranks, a file in a bucket as a stream, the exact nearest candidate
over all ranks, and batches of a data set. Each is imported when it is first asked for: a program sets its signal
handlers before torch takes seconds to load.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from naign.data.batches import open_dataset
    from naign.match.index import nearest
    from naign.match.sharded import ShardedIndex
    from naign.model.naign import NAIGN
    from naign.storage.streams import gopen

__all__ = ["NAIGN", "ShardedIndex", "gopen", "nearest", "open_dataset"]

_MODULES = {
    "NAIGN": "naign.model.naign",
    "ShardedIndex": "naign.match.sharded",
    "gopen": "naign.storage.streams",
    "nearest": "naign.match.index",
    "open_dataset": "naign.data.batches",
}

# Set before torch loads OpenMP: waiting threads spin for some microseconds, then sleep. Beside one other busy process
# they would take its time, and training on two cores was 6 times as slow. Without any spinning a match takes a sixth
# longer on an idle machine, and a step 6 %; with 10 times as much it takes two thirds longer beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Before the first product on a GPU: cuBLAS then sums in the same order each time (distributed/connect.py, repeat_bits).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Before torch loads: its store and sockets log a stack of 20 lines for each rank that they lose.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_PACKAGE = Path(__file__).resolve().parent


def shipped(path: str) -> Path:
    """The place of a file of configs/, launch/, k8s/, models/ or pipeline/.

    In a wheel these folders are inside this package; in a checkout they are in the top folder.
    """
    inside = _PACKAGE / path
    folder = Path(path).parts[0]
    if (_PACKAGE / folder).is_dir():
        return inside
    return _PACKAGE.parents[1] / path


def find_version() -> str:
    """The installed version of naign. Imports when it is called: a program sets its handlers before."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("naign")
    except PackageNotFoundError:
        return "0+checkout"  # of a checkout that was never installed


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return find_version()
    if name not in _MODULES:
        raise AttributeError(f"module 'naign' has no attribute '{name}'")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
