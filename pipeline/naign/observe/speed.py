"""Peak memory, and profiler traces of whole rounds."""

import logging
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from naign.errors import InputError

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
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    if match:
        first = int(match[1])
        last = int(match[2] or first)
        if first <= last:
            return range(first, last + 1)
    raise InputError(f"profile.rounds is '{text}': give one round, as 3, or the first and the last, as 3-4")


class Profiler:
    """Writes a trace of each chosen round to profile/ in the run's folder, for https://ui.perfetto.dev."""

    def __init__(self, folder: Path, rounds: str, rank: int) -> None:  # of the run; as parse_rounds takes it
        self._folder = folder / "profile"
        self._rank = rank
        self._rounds = parse_rounds(rounds)

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Around each round of the run. Its trace is written however the round ends."""
        if number not in self._rounds:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        trace = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        trace.start()
        try:
            with self.phase(f"round {number}"):
                yield
        finally:
            self._write(trace, f"rank-{self._rank:05d}-round-{number}.json.gz")

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Around a part of a round, which the trace shows under this name."""
        return torch.profiler.record_function(name)

    def _write(self, trace: torch.profiler.profile, name: str) -> None:
        """Write a trace. A failure is logged and does not end the run."""
        try:
            trace.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self._folder / name))
        except (OSError, RuntimeError) as error:
            log.warning("no trace of rank %d in %s: %s", self._rank, self._folder, error)
            return
        if self._rank == 0:
            log.info("the trace is %s: open it at https://ui.perfetto.dev", self._folder / name)
