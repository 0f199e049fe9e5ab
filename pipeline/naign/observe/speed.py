"""Peak memory, and profiler traces of whole rounds."""

import logging
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from naign.errors import require

log = logging.getLogger("naign.profile")


def peak_memory(device: torch.device) -> float:
    """Peak memory up to now in GB: of torch's tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes there, elsewhere in kilobytes
        return peak / 1e9
    return peak * 1024 / 1e9


def parse_rounds(text: str) -> range:
    """The rounds of '3' or '3-4' (inclusive); '' gives none. Raises InputError for anything else."""
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    rounds = range(0)
    if match:
        rounds = range(int(match[1]), int(match[2] or match[1]) + 1)
    unclear = f"profile.rounds is '{text}': give one round, as 3, or the first and the last, as 3-4"
    require((rounds or not text, unclear))
    return rounds


@contextmanager
def profiled(folder: Path, rank: int, number: int) -> Iterator[None]:
    """Around a round of a run in `folder`: its trace is written to profile/, for https://ui.perfetto.dev."""
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as trace:
        yield
    file = folder / "profile" / f"rank-{rank:05d}-round-{number}.json.gz"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        log.warning("no trace of rank %d in %s: %s", rank, file.parent, error)
