"""Floating-point operations of a network, peak memory, and profiler traces of whole rounds."""

import logging
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from naign.errors import require

log = logging.getLogger("naign.profile")


def forward_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating-point operations of one forward of (1, *shape) by a bare network, in products of matrices and in
    convolutions, a multiply-add as two. A copy on the meta device is counted: no memory, no kernels.
    """
    empty = dict[int, Any]()
    for value in (*network.parameters(), *network.buffers()):
        empty[id(value)] = torch.empty_like(value, device="meta")
    copy = deepcopy(network, empty).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(torch.empty(1, *shape, device="meta"))
    return int(counter.get_total_flops())


def fit_flops(forward: int, forwards: float) -> float:
    """Floating-point operations of training on one image: `forwards` evaluations of `forward` operations each, and a
    backward through each, which costs two (arXiv 2001.08361, 2.1), without recomputation (MFU of 2204.02311, B).
    """
    return 3.0 * forward * forwards


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
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    rounds = range(0)
    if match:
        rounds = range(int(match[1]), int(match[2] or match[1]) + 1)
    require((rounds, f"profile.rounds is '{text}': give one round, as 3, or the first and the last, as 3-4"))
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
