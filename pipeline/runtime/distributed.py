"""What the training program asks of its world: the engine, agreement, and one answer of all ranks."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch._C._distributed_c10d import TCPStore

from pipeline.errors import InputError, Stopped, Unavailable

c10d: Any = dist.distributed_c10d


def build_accelerator(
    timeout: float = 600,  # seconds a rank waits for the others in a collective before it fails
    *,
    precision: str = "",  # fp32, bf16 or fp16; '': what the launcher's configuration says
    accumulate: int = 1,  # micro-batches a step
) -> Accelerator:
    """The engine that the launcher's configuration names, over gloo where there is no GPU."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        raise InputError(
            "the launcher was asked for several ranks but started this process alone, as Accelerate does for "
            "distributed_type MULTI_CPU: use a configuration like launch/cpu.yaml"
        )
    # Said outright, since Accelerate takes ranks without a GPU for unconnected ones unless told that they are CPUs; but
    # told so it would leave DeepSpeed out without a word.
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if deepspeed:
        _check_deepspeed(on_cpu)
    backend = "gloo" if on_cpu else "nccl"
    after = timedelta(seconds=timeout + 60)  # the watchdog comes first, and says more
    patience = InitProcessGroupKwargs(backend=backend, timeout=after)
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("fp32", "no")
    wanted = {"": said, "fp32": "no"}.get(precision, precision)
    if said not in ("no", wanted):
        raise InputError(
            f"the launcher's configuration says mixed_precision: {said}, but train.precision is {precision}: remove one"
        )
    if wanted == "fp16" and on_cpu:
        raise InputError("fp16 needs a GPU: use --train.precision=bf16 or fp32 here")
    if several:
        _join_again(backend, after)
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        mixed_precision=wanted,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[patience] if several or deepspeed else [],
    )
    if several and accelerator.distributed_type == DistributedType.NO:
        # Ranks that do not average their gradients would each train alone, at the same cost and without a word.
        raise InputError(
            f"the launcher started {os.environ['WORLD_SIZE']} ranks but Accelerate connects none of them: "
            "compare its configuration with those in launch/"
        )
    return accelerator


def _join_again(backend: str, timeout: timedelta) -> None:
    """Connect the ranks of a launcher's second attempt, where its store still holds the addresses of the first.

    torchrun and Accelerate keep one store over all attempts of a static rendezvous, and torch takes it for a new one.
    """
    environ = os.environ
    attempt = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environ["TORCHELASTIC_RUN_ID"] != "none":
        return
    store = TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        int(environ["WORLD_SIZE"]),
        is_master=False,
        timeout=timeout,
    )
    dist.init_process_group(
        backend,
        store=c10d.PrefixStore(f"attempt-{attempt}", store),
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        timeout=timeout,
    )


def _check_deepspeed(on_cpu: bool) -> None:
    """InputError where the launcher asks for DeepSpeed and it cannot work."""
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"the launcher's configuration asks for DeepSpeed, but {' and '.join(missing)} is not installed: "
            "pip install -e '.[deepspeed]'"
        )
    if on_cpu and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise InputError(
            "use_cpu: true switches DeepSpeed off without a word: set use_cpu: false; CPUs work all the same"
        )
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


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
    """Collective: an InputError, Unavailable or Stopped of any rank inside becomes one on all, so that none waits for
    one that left.
    """
    mine: tuple[str, str] | None = None
    try:
        yield
    except (InputError, Unavailable, Stopped) as error:
        mine = type(error).__name__, str(error)
    failures = [mine]
    if accelerator.num_processes > 1:
        failures = [None] * accelerator.num_processes
        dist.all_gather_object(failures, mine)
    kinds = {"InputError": InputError, "Unavailable": Unavailable, "Stopped": Stopped}
    for kind, raised in kinds.items():  # what is wrong goes before what was asked for
        for failure in failures:
            if failure and failure[0] in (kind, "Conflict"):
                raise raised(failure[1])


def total(values: list[float], accelerator: Accelerator) -> list[float]:
    """Collective: each value summed over the ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes > 1:
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.cpu()]
