"""Whether a GPU computes what the CPU does, and the same bits each time. Takes some seconds; for `naign doctor`."""

import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pipeline import philox
from pipeline.distributed.connect import repeat_bits

REMEDY = "its numbers cannot be trusted: update the driver, install torch for it, or take another card"
RING_VALUES, RING_SECONDS = 1 << 24, 60  # float32 values that are summed over the devices, and the time limit
RING_REMEDY = "ranks cannot communicate: set NCCL_DEBUG=INFO and see what it says; NCCL_P2P_DISABLE=1 may help"


def self_test(device: torch.device) -> Iterator[tuple[str, str]]:
    """Observations, each with its remedy or ""."""
    ids = torch.tensor([0, 1, 5, 2**40 + 3, 2**61 + 7])
    expected, drawn = (philox.uniform(3, 2, ids, (3, 32, 32), where).cpu() for where in ("cpu", device))
    wrong = int((expected != drawn).sum())
    yield f"random numbers other than the CPU's: {wrong} of {drawn.numel()}", REMEDY if wrong else ""

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, weights = torch.randn(8, 16, 28, 28), torch.randn(32, 16, 3, 3)
    on_cpu = convolve(images.clone(), weights.clone())
    first, second = (convolve(images.to(device), weights.to(device)) for _ in range(2))
    error = max(float((a - b.cpu()).norm() / a.norm()) for a, b in zip(on_cpu, first, strict=True))
    yield f"a convolution and its gradients differ from the CPU's by {error:.1e}", REMEDY if error > 1e-2 else ""

    other = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    remedy = "resumed runs would not repeat their bits on it: report the card and the version of torch"
    yield f"of three results {other} have other bits the second time", remedy if other else ""


def convolve(images: Tensor, weights: Tensor) -> list[Tensor]:
    """A convolution and its two gradients, by the algorithms that training uses on a GPU."""
    before: Any = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    if images.is_cuda:
        repeat_bits()
    try:
        images, weights = images.requires_grad_(), weights.requires_grad_()
        out = F.conv2d(images, weights, padding=1)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), (images, weights))]
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def ring(backend: str, count: int, values: int = RING_VALUES) -> Iterator[tuple[str, str]]:
    """Sum `values` numbers over `count` devices, as the ranks of a machine do. Yields an observation and its remedy."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_sum_over_ranks, (backend, count, values, folder), nprocs=count)
            seconds = max(float(file.read_text()) for file in Path(folder).glob("seconds-*"))
        except Exception as error:  # of many kinds, and with the traceback of another process
            last = str(error).strip().splitlines()[-1]
            yield f"{backend} on {count} devices fails: {last}", RING_REMEDY
            return
    rate = 4 * values * 2 * (count - 1) / count / seconds / 1e9
    yield f"{backend} on {count} devices sums {4 * values / 1e6:.0f} MB right, at {rate:.1f} GB/s a device", ""


def _sum_over_ranks(rank: int, backend: str, count: int, values: int, folder: str) -> None:
    limit, device = timedelta(seconds=RING_SECONDS), torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{folder}/meeting", limit, count, rank)
    mine, seconds = torch.full((values,), float(rank + 1), device=device), []
    for _ in range(3):
        begin, sums = time.perf_counter(), mine.clone()
        dist.all_reduce(sums)
        mean = float(sums.double().mean())  # waits for the device
        seconds.append(time.perf_counter() - begin)
        if mean != count * (count + 1) / 2:
            raise ValueError(f"rank {rank}: the mean is {mean}, not {count * (count + 1) / 2}")
    Path(folder, f"seconds-{rank}").write_text(str(min(seconds)))
    dist.destroy_process_group()
