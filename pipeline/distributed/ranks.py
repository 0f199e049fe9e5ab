"""Connecting the ranks, and what they decide collectively: errors, sums and answers."""

import ctypes
import importlib.util
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, without an export
from torch.distributed import distributed_c10d as c10d

from pipeline.distributed.gpus import check_bf16, check_gpus
from pipeline.distributed.versions import check_versions
from pipeline.errors import BY_WEIGHT, SHARED, InputError, PeerLost, printable, require

log = logging.getLogger("naign.distributed")


def build_accelerator(
    timeout: float = 600,  # seconds a rank waits for the others in a collective before it fails
    *,
    precision: str = "",  # fp32, bf16, fp16 or auto (`choose_precision`); '': what the launcher's configuration says
    accumulate: int = 1,  # micro-batches a step
) -> Accelerator:
    """The Accelerator that the launcher's configuration asks for, over gloo where there is no GPU. Collective.

    Raises InputError where that configuration contradicts the arguments or the machine.
    """
    environ = os.environ
    several = int(environ.get("WORLD_SIZE", "1")) > 1
    ranks = int(environ.get("LOCAL_WORLD_SIZE", "1"))  # of this host
    use_cpu = environ.get("ACCELERATE_USE_CPU", "").lower()
    on_cpu = use_cpu == "true" or not torch.cuda.is_available()
    deepspeed = environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if "WORLD_SIZE" not in environ and "MASTER_ADDR" in environ:
        alone = "the launcher was asked for several ranks but started this process alone, as Accelerate does for"
        raise InputError(f"{alone} distributed_type MULTI_CPU: use a configuration like launch/cpu.yaml")
    if several and not deepspeed and on_cpu and use_cpu == "false":
        said = "the launcher's configuration says use_cpu: false (launch/cpu.yaml is for CPUs)"
        check_gpus(said, ranks)
    if not on_cpu:
        check_gpus(f"{ranks} ranks were started here", ranks)
        if precision == "bf16":
            check_bf16()
    if deepspeed:
        _check_deepspeed(on_cpu)
    check_versions("torch", "accelerate")
    mixed = _mixed_precision(precision, on_cpu=on_cpu, deepspeed=deepspeed)
    backend, connecting = "gloo" if on_cpu else "nccl", timedelta(seconds=timeout + 60)
    # Before training, one rank may download data or a checkpoint for long. In training the watchdog ends ranks sooner.
    collective = max(connecting, timedelta(hours=2))
    if several and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _connect_ranks(backend, connecting, collective)
    accelerator = Accelerator(
        # Without cpu=True Accelerate takes ranks without a GPU for unconnected ones; with it, it skips DeepSpeed.
        cpu=on_cpu and not deepspeed,
        mixed_precision=mixed,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=collective)] if several or deepspeed else [],
    )
    if not on_cpu:
        repeat_bits()
    if several and accelerator.distributed_type == DistributedType.NO:  # each rank would train alone, silently
        said = f"the launcher started {environ['WORLD_SIZE']} ranks but Accelerate connects none of them"
        raise InputError(f"{said}: compare its configuration with those in launch/")
    return accelerator


def repeat_bits() -> None:
    """Make a GPU compute the same bits each time, so that a resumed run equals one that never stopped.

    Otherwise cuDNN may choose atomic sums for the gradients of convolutions. cuBLAS needs a fixed workspace, which
    pipeline/__init__.py sets. Operations without a deterministic algorithm warn.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not each new tensor


def _mixed_precision(precision: str, *, on_cpu: bool, deepspeed: bool) -> str:
    """Accelerate's `mixed_precision` for train.precision; InputError where the launcher's configuration differs."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("fp32", "no")
    if precision == "auto":
        precision = "" if configured != "no" or deepspeed else choose_precision(on_cpu)
    wanted = {"": configured, "fp32": "no"}.get(precision, precision)
    said = f"the launcher's configuration says mixed_precision: {configured}, but train.precision is {precision}"
    require(
        (configured in ("no", wanted), f"{said}: remove one"),
        (wanted != "fp16" or not on_cpu, "fp16 needs a GPU: use --train.precision=bf16 or fp32 here"),
    )
    return wanted


def choose_precision(on_cpu: bool) -> str:
    """bf16 where the processor or GPU multiplies it natively, else fp32: elsewhere it is slower than float32."""
    if not on_cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16")) else "fp32"


def _connect_ranks(backend: str, connecting: timedelta, collective: timedelta) -> None:
    """Initialize the process group under torchrun or Accelerate, over a store that rank 0 opens for this attempt.

    The launcher's store survives restarts and keeps addresses of dead ranks. It is used only to publish the port of
    rank 0's own store.
    """
    host = os.environ["MASTER_ADDR"]
    main_port, rank, world = (int(os.environ[name]) for name in ("MASTER_PORT", "RANK", "WORLD_SIZE"))
    launcher = TCPStore(host, main_port, world, is_master=False, timeout=connecting)
    if rank == 0:
        store = TCPStore(host, 0, world, is_master=True, timeout=connecting, wait_for_workers=False)
        launcher.set("port", str(store.port))
    else:
        end = time.monotonic() + connecting.total_seconds()
        while True:
            with suppress(OSError):  # a port that refuses connections is an earlier attempt's
                socket.create_connection((host, port := int(launcher.get("port"))), timeout=5).close()
                break
            if time.monotonic() > end:
                raise PeerLost(f"rank {rank} waited {connecting} for rank 0, on {host}")
            time.sleep(0.1)
        store = TCPStore(host, port, world, is_master=False, timeout=connecting)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=collective)


def _check_deepspeed(on_cpu: bool) -> None:
    """Raise InputError where the launcher asks for DeepSpeed and it cannot work."""
    if missing := [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]:
        said = f"the launcher's configuration asks for DeepSpeed, but {' and '.join(missing)} is not installed"
        raise InputError(f"{said}: in a checkout, pip install -e '.[deepspeed]'")
    if not on_cpu:
        check_versions("deepspeed")
        return
    compiler, use_cpu = shutil.which(os.environ.get("CXX", "c++")), os.environ.get("ACCELERATE_USE_CPU", "").lower()
    compiled = "on CPUs DeepSpeed compiles its communication: install a C++ compiler (g++), or use DDP"
    switched = "use_cpu: true silently switches DeepSpeed off: set use_cpu: false, which works on CPUs too"
    require((compiler, compiled), (use_cpu != "true", switched))
    from pipeline.distributed.zero import compile_communication

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    check_versions("deepspeed")
    compile_communication()


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


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Context, collective: an error that one rank raises inside is raised on every rank, so that no rank waits in vain.

    Covers the classes of `errors.SHARED`; a subclass from elsewhere arrives as the nearest of them. If ranks raise
    different errors, the one with the most specific exit code wins (`errors.BY_WEIGHT`), then that of the lowest rank.
    """
    mine: tuple[int, str] | None = None
    try:
        yield
    except SHARED as error:
        mine = next(SHARED.index(kind) for kind in type(error).__mro__ if kind in SHARED), str(error)
    gathered = [mine] * accelerator.num_processes
    if accelerator.num_processes > 1:
        dist.all_gather_object(gathered, mine)
    if failures := [(SHARED[found[0]], found[1]) for found in gathered if found]:
        kind, message = min(failures, key=lambda failure: BY_WEIGHT.index(failure[0].code))
        raise kind(message)


LOST = (
    *("Connection closed by", "closed by remote peer", "reset by peer", "Broken pipe", "Socket closed"),
    *("remote process exited", "connectFullMesh failed", "Timed out waiting"),
)
"""Parts of the messages of gloo and NCCL about a rank that is gone."""

NCCL_LOST = (*LOST, "ncclRemoteError", "ncclSystemError", "collective operation timeout", "was aborted")
OWN = (
    *("ncclInvalidUsage", "ncclInvalidArgument", "ncclUnhandledCudaError", "unhandled cuda error"),
    *("out of memory", "shared memory", "No space left", "failed to listen"),
)
"""Parts of the messages about a fault of this rank or its machine, which starting all again would not mend."""


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective or the store failed because another rank is gone, or silent for too long."""
    text = str(error)
    if not isinstance(error, RuntimeError) or any(sign in text for sign in OWN):
        return False
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):  # of the store, which is rank 0's
        return True
    signs = NCCL_LOST if isinstance(error, dist.DistBackendError) else LOST
    return any(sign in text for sign in signs)


@contextmanager
def peers_missed() -> Iterator[None]:
    """Turn what a collective raises when another rank is gone into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        said = str(error).partition("\nException raised from")[0]  # the rest is a stack
        rank, reason = os.environ.get("RANK", "0"), printable(" ".join(said.split()), 400)
        raise PeerLost(f"rank {rank} lost another rank, and ends ({reason})") from error


def part(seconds: float = 10.0) -> None:
    """Wait until every rank calls this, so that none closes its connections while another still receives the result of
    the last collective.

    Uses the store, since a barrier would be such a collective itself. Rank 0, which has the store, returns last. After
    `seconds` a rank waits no longer for others.
    """
    if not dist.is_initialized() or (world := dist.get_world_size()) == 1:
        return
    rank, store = dist.get_rank(), c10d.PrefixStore("part", c10d._get_default_store())
    with suppress(RuntimeError):  # somebody left already
        for sign in ("here", "leaving"):
            store.set(f"{sign}/{rank}", "")
            if sign == "here" or rank == 0:
                store.wait([f"{sign}/{other}" for other in range(world)], timedelta(seconds=seconds))


def total(values: list[float], accelerator: Accelerator) -> list[float]:
    """Collective: each value summed over the ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes > 1:
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.cpu()]
