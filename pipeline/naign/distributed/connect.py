"""Connect the ranks as the launcher's configuration asks: the process group, the precision, DeepSpeed."""

import importlib.util
import os
import shutil
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, check_cuda_p2p_ib_support
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, without an export

from naign.distributed.host import check_gpus, count_ranks, why_unfit
from naign.errors import InputError, require


def build_accelerator(
    timeout: float = 600,
    *,
    precision: str = "",
    accumulate: int = 1,
) -> Accelerator:
    """The Accelerator that the launcher's configuration asks for, over gloo where there is no GPU. Collective.

    A rank waits `timeout` seconds for the others before it fails. `precision` is fp32, bf16, auto
    (`choose_precision`), or '' for that of the launcher. A step has `accumulate` micro-batches. Raises InputError where
    the launcher's configuration contradicts the arguments or the machine.
    """
    world = count_ranks("WORLD_SIZE")
    local = count_ranks()  # of this host
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    on_cpu = use_cpu == "true" or not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        alone = "the launcher started this process alone (MULTI_CPU)"
        raise InputError(f"{alone}: use a configuration like launch/cpu.yaml")
    if world > 1 and not deepspeed and on_cpu and use_cpu == "false":
        check_gpus("the launcher's configuration says use_cpu: false (launch/cpu.yaml is for CPUs)", local)
    if not on_cpu:
        _check_cards(local, precision)
    if deepspeed:
        _check_deepspeed(on_cpu, use_cpu)
    _forget_settings(sharded=world > 1, deepspeed=deepspeed)
    mixed = _mixed_precision(precision, on_cpu=on_cpu, deepspeed=deepspeed)
    backend = "gloo" if on_cpu else "nccl"
    connecting = timedelta(seconds=timeout + 60)
    # Before training, one rank may download data or a checkpoint for long. In training the watchdog ends ranks sooner.
    collective = max(connecting, timedelta(hours=2))
    handlers = []
    if world > 1:
        _connect_ranks(backend, world, connecting, collective)
    if world > 1 or deepspeed:
        handlers = [InitProcessGroupKwargs(backend=backend, timeout=collective)]
    accelerator = Accelerator(
        # Without cpu=True Accelerate takes ranks without a GPU for unconnected ones; with it, it skips DeepSpeed.
        cpu=on_cpu and not deepspeed,
        mixed_precision=mixed,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=handlers,
    )
    if not on_cpu:
        repeat_bits()
    if world > 1 and accelerator.distributed_type == DistributedType.NO:  # each rank would train alone
        raise InputError(f"Accelerate connects none of {world} ranks: compare its configuration with those in launch/")
    return accelerator


def _check_cards(local: int, precision: str) -> None:
    """Raise InputError or Unavailable where the ranks of this host cannot each use a GPU."""
    check_gpus(f"{local} ranks were started here", local)
    problem = why_unfit(int(os.environ.get("LOCAL_RANK", "0")))
    require((not problem, problem))
    emulated = precision == "bf16" and choose_precision(on_cpu=False) != "bf16"
    only = f"train.precision is bf16, which {torch.cuda.get_device_name()} only emulates"
    require((not emulated, f"{only}: use --train.precision=fp32 or auto"))
    if not check_cuda_p2p_ib_support():  # some cards with old drivers, which Accelerate refuses otherwise
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


def _forget_settings(*, sharded: bool, deepspeed: bool) -> None:
    """Remove what a launcher's configuration says of settings that the run decides; InputError for FSDP 1."""
    names = ["TORCH_DEVICE", "DYNAMO_BACKEND", "DEBUG_MODE"]
    if not deepspeed:
        names.append("GRADIENT_ACCUMULATION_STEPS")
    for name in names:
        os.environ.pop(f"ACCELERATE_{name}", None)
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true"  # FsdpEngine shards, not Accelerate
    if not use_fsdp or not sharded:
        os.environ.pop("FSDP_VERSION", None)  # not from a launcher of these ranks
    elif os.environ.setdefault("FSDP_VERSION", "1") != "2":
        raise InputError("the launcher's configuration asks for FSDP 1: set fsdp_version: 2 in fsdp_config")


def repeat_bits() -> None:
    """Make a GPU compute the same bits each time, so that a resumed run equals one that never stopped. Operations
    without a deterministic algorithm warn. cuBLAS needs a fixed workspace, which pipeline/naign/__init__.py sets.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not each new tensor


def _mixed_precision(precision: str, *, on_cpu: bool, deepspeed: bool) -> str:
    """Accelerate's `mixed_precision` for train.precision; InputError where the launcher's configuration differs."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("fp32", "no")
    if precision == "auto" and configured == "no" and not deepspeed:
        precision = choose_precision(on_cpu)
    mixed = configured
    if precision not in ("", "auto"):
        mixed = precision.replace("fp32", "no")
    if configured not in ("no", mixed):
        said = f"the launcher's configuration says mixed_precision: {configured}, but train.precision is {precision}"
        raise InputError(f"{said}: remove one")
    require((mixed != "fp16", "the launcher's configuration says mixed_precision: fp16, use bf16 or no"))
    return mixed


def choose_precision(on_cpu: bool) -> str:
    """bf16 where the processor or GPU multiplies it faster than float32, else fp32. Intel's AVX512-BF16 without AMX is
    slower; of the processors with AVX512-BF16 only AMD's have SSE4a.
    """
    if not on_cpu:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif hasattr(torch.cpu, "get_capabilities"):  # from torch 2.12 on
        able = torch.cpu.get_capabilities()
        amd = able.get("sse4a") and able.get("avx512_bf16")
        fast = amd or able.get("amx_bf16") or able.get("sve_bf16")
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def _connect_ranks(backend: str, world: int, connecting: timedelta, collective: timedelta) -> None:
    """Initialize the process group over a store at MASTER_PORT: that of the launcher where it has one (torchrun,
    accelerate launch), else rank 0's. The launcher's survives restarts and other numbers of ranks, each with own keys.
    """
    rank = int(os.environ["RANK"])
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not is_launchers,
        timeout=connecting,
        wait_for_workers=False,
    )
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"start-{restarts}-of-{world}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=collective)


def _check_deepspeed(on_cpu: bool, use_cpu: str) -> None:
    """Raise InputError where the launcher asks for DeepSpeed and it cannot work."""
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        lacking = f"the launcher's configuration asks for DeepSpeed, which needs {' and '.join(missing)}"
        raise InputError(f"{lacking}: in a checkout, pip install -e '.[deepspeed]'")
    if not on_cpu:
        return
    if not shutil.which(os.environ.get("CXX", "c++")):
        raise InputError("on CPUs DeepSpeed compiles its communication: install a C++ compiler (g++), or use DDP")
    if use_cpu == "true":
        raise InputError("use_cpu: true silently switches DeepSpeed off: set use_cpu: false, which works on CPUs too")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from naign.distributed.zero import compile_communication

    compile_communication()
