"""The engine that the launcher's configuration asks for, and what it cannot do."""

import os
import shutil
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from naign.config import Config
from naign.distributed.engine import Engine
from naign.distributed.optimizers import find_optimizer
from naign.distributed.zero import ZeroEngine
from naign.errors import InputError, require

LAUNCHER = "the launcher's DeepSpeed configuration"
SHARED_OUT = ("adamw", "muon")  # optimizers whose state FSDP and DeepSpeed can share out


def build_engine(config: Config, bare: nn.Module, accelerator: Accelerator, shape: tuple[int, ...] = ()) -> Engine:
    """The engine that trains `bare` on samples of `shape`; InputError if DeepSpeed is set up otherwise. Collective."""
    kind = Engine
    if "FSDP_VERSION" in os.environ:
        from naign.distributed.fsdp import FsdpEngine as kind  # which takes a second to import
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        kind = ZeroEngine
    elif accelerator.device.type == "cuda":
        bare.to(memory_format=torch.channels_last)  # type: ignore[call-overload,unused-ignore]  # torch 2.15 declares it
    return kind(accelerator, bare, config.train, shape=shape)


def check_engine(config: Config, accelerator: Accelerator) -> None:
    """Raise InputError where the launcher's engine cannot do what the configuration asks for."""
    train = config.train
    objective = config.objective
    batch = train.batch
    accumulate = train.accumulate
    world = accelerator.num_processes
    find_optimizer(train.optimizer)
    if batch % (world * accumulate):
        ranks = [str(number) for number in range(1, batch // accumulate + 1) if batch % (number * accumulate) == 0]
        uneven = f"train.batch={batch} images cannot be shared evenly by {world} ranks x {accumulate} micro-batches"
        raise InputError(f"{uneven}: use {', '.join(ranks)} ranks, or another train.batch in a new run")
    is_fsdp = "FSDP_VERSION" in os.environ
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    engine = "FSDP" if is_fsdp else "DeepSpeed"
    apart = f"does not go with {engine}: leave it out, or use DDP"
    if is_fsdp or is_deepspeed:
        require(
            (train.optimizer in SHARED_OUT, f"train.optimizer={train.optimizer} {apart}"),
            (not train.compile, f"train.compile={train.compile} {apart}"),
        )
    if is_fsdp:
        offloaded = os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
        require(
            (not objective.needs_frozen, f"objective.name={objective.name} {apart}"),
            (not offloaded, f"fsdp_offload_params {apart}"),
        )
    able = not train.compile or torch.__version__ >= "2.12.0a0"
    require((able, f"train.compile needs torch 2.12, and this is {torch.__version__}: leave it out"))
    if train.compile and accelerator.device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
        lacking = f"train.compile needs a C++ compiler, and {compiler} is not there"
        require((shutil.which(compiler), f"{lacking}: install it, name another in CXX, or leave train.compile out"))
    if not is_deepspeed:
        return
    plugin = accelerator.state.deepspeed_plugin
    precision = accelerator.mixed_precision
    configured = plugin.deepspeed_config
    stage = int(plugin.zero_stage)
    for name in sorted({"optimizer", "scheduler"} & configured.keys()):
        raise InputError(f"{LAUNCHER} has a section '{name}', which is the run's: remove it")
    for name in ("bf16", "fp16"):
        enabled = configured.get(name, {}).get("enabled", "auto")
        asked = precision.replace("no", "fp32")
        conflict = f"{LAUNCHER} says {name}.enabled: {enabled}, but the run's precision is {asked}"
        require((enabled in ("auto", asked == name), f"{conflict}: remove it there, or change train.precision"))
    frozen = f"objective.name={objective.name} evaluates a frozen copy of the network"
    allowed = not objective.needs_frozen or (stage < 3 and precision == "no")
    require(
        (allowed, f"{frozen}: use DDP, or ZeRO 1 to 2 in float32, which allow that"),
        (stage > 0, f"{LAUNCHER} asks for ZeRO-0, which shares out nothing: use ZeRO 1 to 3, or DDP"),
    )
