"""What the training program asks of its world: the engine, agreement, and one answer of all ranks."""

import contextlib
import ctypes
import importlib.util
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch._C._distributed_c10d import TCPStore

from pipeline.errors import InputError, PeerLost, Stopped, Unavailable

log = logging.getLogger("naign.distributed")


def build_accelerator(
    timeout: float = 600,  # seconds a rank waits for the others in a collective before it fails
    *,
    precision: str = "",  # fp32, bf16, fp16 or auto (`choose_precision`); '': what the launcher's configuration says
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
    if several and not deepspeed and on_cpu and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "false":
        raise InputError(
            "the launcher's configuration says use_cpu: false, but torch can use no GPU here (`naign doctor` says "
            "more): launch/cpu.yaml is for CPUs"
        )
    backend = "gloo" if on_cpu else "nccl"
    soon = timedelta(seconds=timeout + 60)
    # Of collectives: before training one rank may bring data or a checkpoint for long; in it the watchdog comes first.
    after = max(soon, timedelta(hours=2))
    patience = InitProcessGroupKwargs(backend=backend, timeout=after)
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("fp32", "no")
    if precision == "auto":
        precision = "" if said != "no" or deepspeed else choose_precision(on_cpu)
    wanted = {"": said, "fp32": "no"}.get(precision, precision)
    if said not in ("no", wanted):
        raise InputError(
            f"the launcher's configuration says mixed_precision: {said}, but train.precision is {precision}: remove one"
        )
    if wanted == "fp16" and on_cpu:
        raise InputError("fp16 needs a GPU: use --train.precision=bf16 or fp32 here")
    if several and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _join(backend, soon, after)
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


def choose_precision(on_cpu: bool) -> str:
    """bf16 where the processor or GPU multiplies it natively, else fp32: elsewhere it is slower than float32."""
    if not on_cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16")) else "fp32"


def _join(backend: str, within: timedelta, timeout: timedelta) -> None:
    """Connect the ranks of a launcher that lends them its store (torchrun, Accelerate), by one of this attempt's own.

    The launcher keeps one store over all its attempts to start the ranks, where torch would read the addresses of those
    that died. Nor do its agents agree on the number of the attempt. So the first rank opens a store that ends with it,
    and the launcher's says only where: a port that nobody answers at is an earlier attempt's.
    """
    environ = os.environ
    host, rank, world = environ["MASTER_ADDR"], int(environ["RANK"]), int(environ["WORLD_SIZE"])
    lent = TCPStore(host, int(environ["MASTER_PORT"]), world, is_master=False, timeout=within)
    if rank == 0:
        store = TCPStore(host, 0, world, is_master=True, timeout=within, wait_for_workers=False)
        lent.set("port", str(store.port))
    else:
        end = time.monotonic() + within.total_seconds()
        while not _answers(host, port := int(lent.get("port"))):
            if time.monotonic() > end:
                raise TimeoutError(f"rank {rank} waited {within} for the first rank, on {host}")
            time.sleep(0.1)
        store = TCPStore(host, port, world, is_master=False, timeout=within)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


def _check_deepspeed(on_cpu: bool) -> None:
    """InputError where the launcher asks for DeepSpeed and it cannot work."""
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"the launcher's configuration asks for DeepSpeed, but {' and '.join(missing)} is not installed: "
            "pip install -e '.[deepspeed]'"
        )
    if on_cpu and not shutil.which(os.environ.get("CXX", "c++")):
        raise InputError("on CPUs DeepSpeed compiles how its ranks talk: install a C++ compiler (g++), or use DDP")
    if on_cpu and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise InputError(
            "use_cpu: true switches DeepSpeed off without a word: set use_cpu: false; CPUs work all the same"
        )
    if on_cpu:
        from pipeline.distributed.engine import compile_communication

        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        compile_communication()


def set_threads(threads: int) -> None:
    """CPU threads of this rank; 0: this machine's cores shared among its ranks (launchers export 1)."""
    torch.set_num_threads(threads or max(1, len(_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def warn_of_others(seconds: float = 0.2) -> None:
    """Look for `seconds` at the cores that this machine's ranks count on, and say so where other programs have them.

    The threads of a convolution in bfloat16 spin while they wait for one another (oneDNN's own barrier, on which
    OMP_WAIT_POLICY has no say): with two, beside a busy process, MNIST went at 14 images/s instead of 200 to 300.
    """
    threads, ranks, cores = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _cores()
    if threads == 1:
        return
    shares = psutil.cpu_percent(seconds, percpu=True)
    busy = sum(shares[core] for core in cores if core < len(shares)) / 100
    if threads * ranks > len(cores) - busy + 0.5:
        log.warning(
            "other programs keep %.1f of %d cores busy: threads that wait for one another may train many times "
            "slower than fewer would, try --train.threads=%d",
            busy,
            len(cores),
            max(1, round(len(cores) - busy) // ranks),
        )


def _cores() -> set[int]:
    """That this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


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


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo, torch's store and NCCL say of a rank that is gone."""


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


@contextmanager
def peers_missed() -> Iterator[None]:
    """Turn what a collective raises when another rank is gone into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        rank = os.environ.get("RANK", "0")
        raise PeerLost(f"rank {rank} lost another rank, and ends ({str(error).splitlines()[0]})") from error


def total(values: list[float], accelerator: Accelerator) -> list[float]:
    """Collective: each value summed over the ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes > 1:
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.cpu()]
