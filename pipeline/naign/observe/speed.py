"""Floating-point operations, peak speed and memory of the machine, and profiler traces of whole rounds."""

import logging
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from naign.errors import InputError

log = logging.getLogger("naign.profile")


def forward_flops(network: nn.Module, shape: tuple[int, ...], batch: int = 1) -> int:
    """Floating-point operations of one forward of (batch, *shape) by a bare network, in products of matrices and in
    convolutions, a multiply-add as two. A copy on the meta device is counted: no memory, no kernels.
    """
    values = [*network.parameters(), *network.buffers()]
    empty: dict[int, Any] = {id(value): torch.empty_like(value, device="meta") for value in values}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        deepcopy(network, empty).eval()(torch.empty(batch, *shape, device="meta"))
    return int(counter.get_total_flops())


def fit_flops(forward: int, forwards: float) -> float:
    """Floating-point operations of training on one image: `forwards` evaluations of `forward` operations each, and a
    backward through each, which costs two (arXiv 2001.08361, 2.1), without recomputation (MFU of 2204.02311, B).
    """
    return 3.0 * forward * forwards


PEAKS = {
    # Name without maker:  bfloat16, float16, TF32, float32; dense TFLOPS of tensor cores with float32 accumulation.
    r"B200": (2250, 2250, 1100, 75),
    r"H200|H100 \d+GB HBM\w+": (989, 989, 494, 67),  # SXM
    r"H[12]00 NVL": (836, 836, 418, 60),
    r"H100 PCIe": (756, 756, 378, 51),
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": (312, 312, 156, 19.5),
    r"L40S": (362, 362, 183, 91.6),
    r"L4": (121, 121, 60, 30.3),
    r"A10": (125, 125, 62.5, 31.2),
    r"GeForce RTX 4090": (165.2, 165.2, 82.6, 82.6),
    r"V100-SXM\d-\d+GB": (0, 125, 15.7, 15.7),  # no bfloat16 in hardware, and TF32 is float32
    r"V100-PCIE-\d+GB": (0, 112, 14, 14),
    r"T4": (0, 65, 8.1, 8.1),
}
"""From NVIDIA's data sheets, in which sparsity doubles most figures. A part of a GPU (MIG, vGPU) has another name."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a GPU, for float32 of TF32 if convolutions use it; None for an unknown GPU and for a CPU."""
    if device.type != "cuda":
        return None
    name = re.sub(r"^(NVIDIA|Tesla) ", "", torch.cuda.get_device_name(device))
    for pattern, (bfloat16, float16, tf32, float32) in PEAKS.items():
        if re.fullmatch(pattern, name):
            plain = tf32 if torch.backends.cudnn.conv.fp32_precision == "tf32" else float32  # type: ignore[attr-defined]
            peaks = {torch.bfloat16: bfloat16, torch.float16: float16, torch.float32: plain}
            return peaks.get(dtype, 0) * 1e12 or None
    return None


def peak_memory(device: torch.device) -> float:
    """Peak memory up to now in GB: of torch's tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def parse_rounds(text: str) -> range:
    """The rounds of '3' or '3-4' (inclusive); '' gives none. Raises InputError for anything else."""
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    if match and (rounds := range(int(match[1]), int(match[2] or match[1]) + 1)):
        return rounds
    raise InputError(f"profile.rounds is '{text}': give one round, as 3, or the first and the last, as 3-4")


class Profiler:
    """Writes a trace of each chosen round to profile/ in the run's folder, for https://ui.perfetto.dev."""

    def __init__(self, folder: Path, rounds: str, rank: int) -> None:  # of the run; as parse_rounds takes it
        self._folder, self._rank, self._rounds = folder / "profile", rank, parse_rounds(rounds)
        self._tracing = False

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Around each round of the run. Its trace is written however the round ends."""
        if number not in self._rounds:
            yield
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        trace = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        trace.start()
        self._tracing = True
        try:
            with self.phase(f"round {number}"):
                yield
        finally:
            self._tracing = False
            self._write(trace, f"rank-{self._rank:05d}-round-{number}.json.gz")

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Around a part of a round, which the trace shows under this name."""
        return torch.profiler.record_function(name) if self._tracing else nullcontext()

    def _write(self, trace: torch.profiler.profile, name: str) -> None:
        """Write a trace. A failure is logged and does not end the run."""
        try:
            trace.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self._folder / name))
            if self._rank == 0:
                log.info("the trace is %s: open it at https://ui.perfetto.dev", self._folder / name)
        except (OSError, RuntimeError) as error:
            log.warning("no trace of rank %d in %s: %s", self._rank, self._folder, error)
