"""What the training program asks of its world: the engine, agreement, and one answer of all ranks."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from pipeline.errors import InputError, Unavailable


def build_accelerator(
    timeout: float = 600,  # seconds a rank waits for the others in a collective before it fails
) -> Accelerator:
    """The engine that the launcher's configuration names, over gloo where there is no GPU."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        raise InputError(
            "the launcher was asked for several ranks but started this process alone, as Accelerate does for "
            "distributed_type MULTI_CPU: use a configuration like launch/cpu.yaml"
        )
    # Said outright, since Accelerate takes ranks without a GPU for unconnected ones unless told that they are CPUs.
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patience] if several else [])
    if several and accelerator.distributed_type == DistributedType.NO:
        # Ranks that do not average their gradients would each train alone, at the same cost and without a word.
        raise InputError(
            f"the launcher started {os.environ['WORLD_SIZE']} ranks but Accelerate connects none of them: "
            "compare its configuration with those in launch/"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InputError("DeepSpeed engines are not supported yet: use a launcher configuration without DeepSpeed")
    return accelerator


def set_threads(threads: int) -> None:
    """CPU threads of this rank; 0: this machine's cores shared among its ranks (launchers export 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_memory() -> None:
    """Let freed memory stay with the process, where the C library is glibc.

    It would be returned to the system and each large tensor begin by fetching its pages again, which takes a fifth of a
    CPU round: MNIST's took 2.0 seconds so, and 1.6 without.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: the largest it takes


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Collective: an InputError or Unavailable of any rank inside becomes one on every rank, so that none waits for one
    that left.
    """
    mine: tuple[str, str] | None = None
    try:
        yield
    except (InputError, Unavailable) as error:
        mine = type(error).__name__, str(error)
    failures = [mine]
    if accelerator.num_processes > 1:
        failures = [None] * accelerator.num_processes
        dist.all_gather_object(failures, mine)
    for failure in failures:
        if failure:
            kind, message = failure
            raise InputError(message) if kind == "InputError" else Unavailable(message)


def total(values: list[float], accelerator: Accelerator) -> list[float]:
    """Collective: each value summed over the ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes > 1:
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.cpu()]
