"""What a rank takes of its host: CPU threads and memory."""

import ctypes
import logging
import os
import sys
import time

import psutil
import torch

log = logging.getLogger("naign.distributed")


def set_threads(threads: int) -> None:
    """CPU threads of this rank. 0: OMP_NUM_THREADS, or under a launcher, which exports 1, the rank's share of the
    cores."""
    launched = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if threads or launched or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, len(_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def warn_of_others(seconds: float = 0.2) -> None:
    """Measure for `seconds` how busy the cores are, and warn where other programs take those that the ranks count on.

    Threads of a bfloat16 convolution spin while they wait (oneDNN's barrier, whatever OMP_WAIT_POLICY says): with two
    beside a busy process MNIST trained at 14 images/s instead of 200 to 300.
    """
    threads, ranks, cores = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _cores()
    if threads == 1:
        return
    before = time.process_time()
    shares = psutil.cpu_percent(seconds, percpu=True)
    ours = (time.process_time() - before) / seconds  # of threads that read ahead
    busy = max(0.0, sum(shares[core] for core in cores if core < len(shares)) / 100 - ours)
    if threads * ranks > len(cores) - busy + 0.5:
        fewer = max(1, round(len(cores) - busy) // ranks)
        log.warning(
            f"other programs keep {busy:.1f} of {len(cores)} cores busy: threads that wait for one another may train "
            f"many times slower than fewer would, try --train.threads={fewer}"
        )


def _cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def keep_memory() -> None:
    """Have glibc keep freed memory, on Linux: page faults of new tensors took 0.4 s of a CPU round of 2.0 s."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: the largest it takes
