"""What a checkpoint of a run holds: weights, the optimizer's state, and the round that it is within."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial as bind
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from naign import find_version
from naign.checkpoint.writer import Write
from naign.config import Config, to_dict
from naign.data.loader import Stream
from naign.distributed.engine import Engine
from naign.errors import InputError
from naign.match.matcher import Match
from naign.model.files import save_model
from naign.model.prior import Prior
from naign.storage.local import write_atomically
from naign.training.run_folder import damage_named, open_tensors, read_model

PRIOR = "state/prior.safetensors"  # what a prior that learns goes on from
VERSIONS = {"naign": find_version(), **{name: version(name) for name in ("torch", "accelerate")}}  # in every checkpoint


@dataclass(kw_only=True, slots=True)
class Position:
    """Where a run stands, over all resumptions."""

    round: int = 0  # the next round, or the current one
    done: int = 0  # steps made of the current round
    images_seen: int = 0  # that f was trained on, over all ranks and passes
    codes_seen: int = 0  # images whose codes the prior learned from while f was frozen
    step: int = 0  # optimizer steps of f and of the prior, and one more a round while f is frozen: names checkpoints
    seconds: float = 0.0  # wall time of the rounds
    cpu_seconds: float = 0.0  # processor time of the rounds, of all ranks and threads
    learned: int = 0  # rounds that the prior has learned from
    skipped: int = 0  # optimizer steps not made, since the loss or its gradient was not finite
    bad_steps: int = 0  # the same, in a row up to now

    @property
    def seen(self) -> int:
        """Images learned from, by f or by the prior alone: the axis of what is reported."""
        return self.images_seen + self.codes_seen


@dataclass(kw_only=True, slots=True)
class PartialRound:
    """What is kept of a round that stopped between two of its steps, so that it can go on bit for bit."""

    world_size_at_start: int  # which decides the images of each step
    match: Match | None = None  # of all images of the round; None if the objective needs none
    sums: dict[str, Tensor] = field(default_factory=dict)  # of each loss over the steps made, on this rank


def restore_weights(checkpoint: Path, network: nn.Module, name: str = "model.safetensors") -> None:
    """Load the weights into a network without an engine. Raises InputError as `restore` does."""
    weights = read_model(checkpoint, name).network.state_dict()
    with damage_named(checkpoint):  # not by load_state_dict, which raises the same RuntimeError for a failing device
        if shapes_of(weights) != shapes_of(network.state_dict()):
            raise ValueError(f"{name} holds the weights of another network")
    network.load_state_dict(weights)


def restore_prior(checkpoint: Path, prior: Prior) -> None:
    """Let a prior that learns go on from a checkpoint. Raises InputError as `restore` does."""
    if not prior.learns:
        return
    if prior.labels and read_model(checkpoint, "model.safetensors").labels != prior.labels:
        other = f"the classes of the data set are not those of {checkpoint}"
        raise InputError(f"{other}: train on data with the same ones, in the same order, or start another run")
    with damage_named(checkpoint):
        file = open_tensors(checkpoint / PRIOR)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        if shapes_of(state) != shapes_of(prior.training_state()):
            raise ValueError(f"{PRIOR} holds the state of another prior")
    prior.load_training_state(state)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor of a state."""
    return {name: value.shape for name, value in state.items()}


def restore(checkpoint: Path, engine: Engine, *, size: int) -> tuple[Position, PartialRound | None]:
    """Load all but the weights, of any engine and world size; `size` is match.round. Collective.

    Raises InputError for files that are damaged or not of this run. Other failures, as of a device, pass unchanged.
    """
    with damage_named(checkpoint):
        trainer = json.loads((checkpoint / "trainer.json").read_text())
        position = Position(**{name: type(default)(trainer[name]) for name, default in asdict(Position()).items()})
        sound = all(0 <= value < 2**53 for value in (*asdict(position).values(), trainer["adam_steps"]))
        if not sound or not 1 <= trainer["began"] <= 2**20 or not isinstance(trainer["match"], dict):
            raise ValueError("trainer.json holds what no run wrote")
        paths = sorted((checkpoint / "state").glob(f"rank-*-of-{trainer['world_size']:05d}.safetensors"))
        if len(paths) != trainer["world_size"]:
            raise ValueError(f"state of {len(paths)} ranks instead of {trainer['world_size']}")
        files = [open_tensors(path) for path in paths]
        file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no iterator)
        rank, world = engine.accelerator.process_index, engine.accelerator.num_processes
        partial = _restore_round(checkpoint, trainer, files, rank, world, size) if position.done else None
    if trainer["adam_steps"]:
        weights = read_model(checkpoint, "model.safetensors").network.state_dict()
        for name in engine.shapes:
            shapes = engine.state_shapes(name)
            with damage_named(checkpoint):
                keys = {key: f"{key}.{name}" for key in shapes if key != "weight"}
                state = {key: file_of[full].get_tensor(full) for key, full in keys.items()} | {"weight": weights[name]}
                if any(value.shape != shapes[key] or not value.is_floating_point() for key, value in state.items()):
                    raise ValueError(f"state of {name} has another shape than {shapes}, or type")
            engine.restore(name, state, trainer["adam_steps"])
    with damage_named(checkpoint):
        engine.scale = trainer["scale"]
    if engine.ema is not None:
        restore_weights(checkpoint, engine.ema, "ema.safetensors")
    return position, partial


def _restore_round(
    checkpoint: Path, trainer: dict[str, Any], files: Sequence[Any], rank: int, world: int, size: int
) -> PartialRound:
    """The current round. Its sums are the rank's own or, where the world size changed, the mean of all ranks'."""
    terms, sums = trainer["terms"], [file.get_tensor("sums") for file in files]
    if any(value.shape != (len(terms),) or not value.is_floating_point() for value in sums):
        raise ValueError(f"the sums of the round are not those of {terms}")
    values = sums[rank] if len(sums) == world else torch.stack(sums).mean(0)
    partial = PartialRound(world_size_at_start=int(trainer["began"]), sums=dict(zip(terms, values, strict=True)))
    if (file := checkpoint / "state/round.safetensors").exists():
        ids, distances = (open_tensors(file).get_tensor(name) for name in ("ids", "distances"))
        typed = ids.dtype == torch.int64 and distances.dtype == torch.float32
        if not typed or ids.shape != (size,) or distances.shape != (size,) or int(ids.min()) < 0:
            raise ValueError(f"state/round.safetensors is not the match of {size} images")
        partial.match = Match(ids=ids, distances=distances, values=trainer["match"])
    return partial


def snapshot(
    config: Config, stream: Stream, engine: Engine, position: Position, prior: Prior, kept: PartialRound | None = None
) -> tuple[Callable[[], None], dict[str, Write]]:
    """What copies all that may change, and what writes each of this rank's files of a checkpoint then. Collective.

    Both are for a background thread: training goes on with the next forward, and the next step waits for the copy.
    Within a round, `kept` is what it can go on from.
    """
    rank, world = engine.accelerator.process_index, engine.accelerator.num_processes
    kept = kept or PartialRound(world_size_at_start=world)
    largest_first = sorted(engine.shapes, key=lambda name: -math.prod(engine.shapes[name]))
    owners = {name: number % world for number, name in enumerate(largest_first)}  # the rank that writes its state
    # Gathered tensors would take room on the device until they are copied.
    take: Callable[[Tensor], Tensor] = _copied if engine.gathers else Tensor.detach
    state, weights, averaged = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, values in engine.states():
        if owners[name] == rank:
            state |= {f"{key}.{name}": take(values[key]) for key in values if key != "weight"}
        if rank == 0:
            weights[name] = take(values["weight"])

    def copy() -> None:
        try:
            for part in (averaged,) if engine.gathers else (state, weights, averaged):
                part |= {name: _copied(value) for name, value in part.items()}
        finally:
            engine.copied.set()

    engine.copied.clear()
    sums = [value.detach().float().cpu() for value in kept.sums.values()]
    state["sums"] = torch.stack(sums) if sums else torch.zeros(0)
    files: dict[str, Write] = {f"state/rank-{rank:05d}-of-{world:05d}.safetensors": bind(save_file, state)}
    # Buffers are copied now: the next forward may change them. On all ranks, since FSDP2 drops gathered weights then.
    weights |= {name: _copied(value) for name, value in engine.bare.state_dict().items() if name not in engine.shapes}
    if rank:
        return copy, files
    metadata = describe(config, stream, position)
    drawn = {name: _copied(value) for name, value in prior.state_dict().items()}
    if prior.learns:
        files[PRIOR] = bind(save_file, {name: _copied(value) for name, value in prior.training_state().items()})
    files["model.safetensors"] = lambda file: save_model(file, weights, metadata, drawn)
    if engine.ema is not None:
        averaged |= engine.ema.state_dict()
        files["ema.safetensors"] = lambda file: save_model(file, averaged, metadata, drawn)
    if match := kept.match:
        files["state/round.safetensors"] = bind(save_file, {"ids": match.ids, "distances": match.distances})
    trainer = asdict(position) | {"epoch": stream.order.epochs(position.round), "world_size": world}
    trainer |= {"began": kept.world_size_at_start, "engine": engine.described, "adam_steps": engine.steps}
    trainer |= {"scale": engine.scale, "match": match.values if match else {}, "terms": list(kept.sums)}
    trainer["versions"] = VERSIONS
    files["trainer.json"] = lambda file: write_atomically(file, json.dumps(trainer, indent=2) + "\n", sync=False)
    return copy, files


def _copied(value: Tensor) -> Tensor:
    """A contiguous copy in this process's memory."""
    return value.detach().to("cpu", copy=True).contiguous()


def describe(config: Config, stream: Stream, position: Position) -> dict[str, Any]:
    """NAIGN.metadata of the model file."""
    return {
        "model": asdict(config.model) | {"init": ""},
        "shape": list(stream.shape),
        "prior": asdict(config.prior),
        **({"labels": list(stream.manifest.labels)} if config.prior.classes else {}),
        "dataset": stream.manifest.name,
        "data": config.data.path,
        "seed": config.seed,
        "images_seen": position.images_seen,
        "training_seconds": position.seconds,
        "cpu_seconds": position.cpu_seconds,
        "config": to_dict(config),
    }
