"""The parts of a run, made from its configuration; what cannot be is refused."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.loader import Stream
from pipeline.distributed.engine import Engine
from pipeline.errors import InputError
from pipeline.match.space import SpaceConfig, check_space
from pipeline.model.encoders import Encoder, load_encoder, names
from pipeline.model.objectives import Distance, ObjectiveConfig
from pipeline.model.perceptual import perceptual
from pipeline.training.round import Run


def open_stream(config: Config, rank: int, world: int) -> Stream:
    """This rank's stream; InputError where the data and the world do not go together."""
    return Stream(config.data, seed=config.seed, round_size=config.match.round, rank=rank, world=world)


def check_engine(config: Config, accelerator: Accelerator) -> None:
    """InputError where the launcher's engine cannot do what the configuration asks for."""
    batch, world, accumulate = config.train.batch, accelerator.num_processes, config.train.accumulate
    if batch % (world * accumulate):
        least = world * accumulate
        near = -(-batch // least) * least
        ranks = [number for number in range(1, batch // accumulate + 1) if batch % (number * accumulate) == 0]
        raise InputError(
            f"train.batch={batch} images cannot be shared evenly by {world} ranks x {accumulate} micro-batches "
            f"(train.accumulate): use {', '.join(map(str, ranks))} ranks; a new run can have --train.batch={near} "
            f"--match.round={max(1, round(config.match.round / near)) * near}"
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    stage = int(accelerator.state.deepspeed_plugin.zero_stage)
    said = accelerator.state.deepspeed_plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in said:
            raise InputError(
                f"the launcher's DeepSpeed configuration has a section '{name}', which is the run's: remove it"
            )
    for name in ("bf16", "fp16"):
        enabled = said.get(name, {}).get("enabled", "auto")
        if enabled != "auto" and enabled != (accelerator.mixed_precision == name):
            raise InputError(
                f"the launcher's DeepSpeed configuration says {name}.enabled: {enabled}, but the run's precision is "
                f"{accelerator.mixed_precision.replace('no', 'fp32')}: remove it there, or change train.precision"
            )
    if config.objective.needs_frozen and (stage == 3 or accelerator.mixed_precision != "no"):
        raise InputError(
            f"objective.name={config.objective.name} evaluates a frozen copy of the network, which ZeRO-3 and "
            "DeepSpeed's low precision do not allow: use ZeRO 0 to 2 in float32, or DDP"
        )
    if stage == 0 and accelerator.mixed_precision != "no":
        raise InputError(
            f"DeepSpeed ZeRO-0 in {accelerator.mixed_precision} keeps its float32 weights where no checkpoint "
            "can reach them: use ZeRO 1 to 3, or DDP"
        )
    for name in ("compile", "channels_last"):
        if getattr(config.train, name):
            raise InputError(
                f"train.{name} does not go with DeepSpeed, which lays weights out anew: leave it out, or use DDP"
            )


def build_engine(config: Config, bare: nn.Module, accelerator: Accelerator) -> Engine:
    """The engine that trains `bare`."""
    train = config.train
    if train.channels_last:
        bare.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Engine(
        accelerator,
        bare,
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
        clip=train.clip,
        batch=train.batch,
        accumulate=train.accumulate,
        ema=train.ema,
        compile=train.compile,
    )


def open_features(
    space: SpaceConfig, shape: tuple[int, ...], device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """The encoder of the match's space, if it has one; InputError where space and data do not go together."""
    check_space(space, shape)
    if not space.features:
        return None
    return _open_encoder("match.space.encoder", space.encoder, shape, device).features


def open_perceived(objective: ObjectiveConfig, shape: tuple[int, ...], device: torch.device) -> Distance | None:
    """The perceptual part of the objective's distance, if it has one; InputError where it is not for such data."""
    if not objective.perceptual:
        return None
    encoder = _open_encoder("objective.encoder", objective.encoder, shape, device)
    if encoder.network is None or not hasattr(encoder.network, "body"):
        raise InputError(f"objective.encoder '{objective.encoder}' has no layers: choose one of {', '.join(names())}")
    return perceptual(encoder.network.body)


def _open_encoder(setting: str, name: str, shape: tuple[int, ...], device: torch.device) -> Encoder:
    encoder = load_encoder(name)
    if encoder.shape not in (None, shape):
        raise InputError(f"{setting} '{name}' reads {encoder.shape}, these images are {shape}")
    if encoder.network:
        encoder.network.to(device)
    return encoder


def shared(texts: list[str], accelerator: Accelerator) -> list[str]:
    """Collective: rank 0's texts."""
    told = list(texts)
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(told, src=0)
    return told


def headline(run: Run, rounds: int, newest: Path | None) -> str:
    """What a run says of itself before the first round."""
    config, stream, engine, train = run.config, run.stream, run.engine, run.config.train
    parameters = sum(math.prod(shape) for shape in engine.shapes.values())
    start = f"resuming from {newest}" if newest else "starting anew"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (
        f"{stream.manifest.name} {'x'.join(map(str, stream.shape))}, {stream.order.describe()}\n"
        f"{config.objective.name} with {parameters / 1e6:.2f} M parameters on {run.world} x "
        f"{run.accelerator.device.type} ({engine.described}; {local} here, {torch.get_num_threads()} threads each)\n"
        f"batch {train.batch} = {engine.micro} images x {train.accumulate} micro-batches x {run.world} ranks; "
        f"{rounds} rounds of {config.match.round} images x {train.passes} passes for {train.images}, "
        f"pool {config.match.pool}; {start} in {config.run.path}"
    )
