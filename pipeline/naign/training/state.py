"""What a checkpoint of a run holds: weights, latents and prior, the optimizers' states, and where the run stands."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from naign import find_version
from naign.checkpoint.writer import Write
from naign.config import Config, to_dict
from naign.data.loader import Stream
from naign.distributed.engine import Engine
from naign.errors import InputError
from naign.model.bank import Bank
from naign.model.files import all_finite, save_model
from naign.model.prior import Latents, Prior
from naign.storage.local import write_atomically
from naign.training.run_folder import damage_named, open_tensors, read_model

PRIOR = "state/prior.safetensors"  # what the fit of the prior goes on from
VERSIONS = {  # in every checkpoint
    "naign": find_version(),
    "torch": version("torch"),
    "accelerate": version("accelerate"),
}


@dataclass(kw_only=True, slots=True)
class State:
    """Where a run stands, over all resumptions."""

    round: int = 0  # rounds of stage 1 that are done
    images_seen: int = 0  # images that f was trained on, over all ranks and passes
    fitted: float = 0.0  # share of stage 2, the fit of the prior, that is done
    codes_seen: int = 0  # the same share of the codes, over all passes
    step: int = 0  # steps of f's optimizer and of the prior's fit: names checkpoints
    seconds: float = 0.0  # wall time of both stages
    cpu_seconds: float = 0.0  # processor time of both stages, of all ranks and threads
    skipped: int = 0  # optimizer steps not made, since the loss or its gradient was not finite
    bad_steps: int = 0  # the same, in a row up to now

    @property
    def seen(self) -> int:
        """Images learned from, by f or by the prior: the axis of what is reported."""
        return self.images_seen + self.codes_seen


def restore_weights(checkpoint: Path, network: nn.Module, name: str = "model.safetensors") -> None:
    """Load the weights into a network without an engine. Raises InputError as `restore` does."""
    weights = read_model(checkpoint, name).network.state_dict()
    with damage_named(checkpoint):  # not by load_state_dict, which raises the same RuntimeError for a failing device
        if shapes_of(weights) != shapes_of(network.state_dict()):
            raise ValueError(f"{name} holds the weights of another network")
    network.load_state_dict(weights)


def restore_draws(checkpoint: Path, latents: Latents, prior: Prior) -> None:
    """Load what latents have measured and where the prior's fit stands. Raises InputError as `restore` does."""
    model = read_model(checkpoint)
    latents.load_state_dict(model.latents.state_dict())
    if not prior.learns:
        return
    if prior.labels and model.labels != prior.labels:
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


def restore(checkpoint: Path, engine: Engine) -> State:
    """Load f's optimizer, of any engine and world size, and return where the run stands. Collective.

    Raises InputError for files that are damaged or not of this run. Other failures, as of a device, pass unchanged.
    """
    with damage_named(checkpoint):
        trainer = json.loads((checkpoint / "trainer.json").read_text())
        state = State(**{name: type(default)(trainer[name]) for name, default in asdict(State()).items()})
        if not all(0 <= value < 2**53 for value in (*asdict(state).values(), trainer["adam_steps"])):
            raise ValueError("trainer.json holds what no run wrote")
        paths = sorted((checkpoint / "state").glob(f"rank-*-of-{trainer['world_size']:05d}.safetensors"))
        if len(paths) != trainer["world_size"]:
            raise ValueError(f"state of {len(paths)} ranks instead of {trainer['world_size']}")
        file_of: dict[str, Any] = {}
        for file in map(open_tensors, paths):
            file_of |= dict.fromkeys(file.keys(), file)
    if trainer["adam_steps"]:
        weights = read_model(checkpoint).network.state_dict()
        for name in engine.shapes:
            shapes = engine.state_shapes(name)
            kept = {"weight": weights[name]}
            with damage_named(checkpoint):
                for key in shapes.keys() - {"weight"}:
                    kept[key] = file_of[f"{key}.{name}"].get_tensor(f"{key}.{name}")
                if any(value.shape != shapes[key] or not value.is_floating_point() for key, value in kept.items()):
                    raise ValueError(f"state of {name} has another shape than {shapes}, or type")
                if not all_finite(kept):
                    raise ValueError(f"state of {name} is not finite")
            engine.restore(name, kept, trainer["adam_steps"])
    if engine.ema is not None:
        restore_weights(checkpoint, engine.ema, "ema.safetensors")
    return state


class Snapshot(NamedTuple):
    """A copy of a run: what a checkpoint writes, whatever changes meanwhile."""

    name: str  # of the checkpoint
    files: dict[str, Write]  # of this rank


def snapshot(
    config: Config,
    stream: Stream,
    engine: Engine,
    state: State,
    latents: Latents,
    prior: Prior,
    bank: Bank,
) -> Snapshot:
    """Take a snapshot, in this process's memory. Collective."""
    rank = engine.accelerator.process_index
    world = engine.accelerator.num_processes
    largest_first = sorted(engine.shapes, key=lambda name: -math.prod(engine.shapes[name]))
    owners = {name: number % world for number, name in enumerate(largest_first)}  # the rank that writes its state
    moments = dict[str, Tensor]()
    weights = dict[str, Tensor]()
    for name, values in engine.states():
        if owners[name] == rank:
            for key in values.keys() - {"weight"}:
                moments[f"{key}.{name}"] = _copied(values[key])
        if rank == 0:
            weights[name] = _copied(values["weight"])
    # On all ranks, since FSDP2 drops gathered weights then.
    for name, value in engine.bare.state_dict().items():
        if name not in engine.shapes:
            weights[name] = _copied(value)

    files: dict[str, Write] = {f"state/rank-{rank:05d}-of-{world:05d}.safetensors": partial(save_file, moments)}
    if rank == 0:
        metadata = describe(config, stream, state)
        drawn = _copies(prior.state_dict(), "prior.") | _copies(latents.state_dict(), "latents.")
        if bank.filled:
            metadata["bank"] = bank.sizes
            drawn |= _copies(bank.state_dict(), "bank.")
        if prior.learns:
            files[PRIOR] = partial(save_file, _copies(prior.training_state()))
        files["model.safetensors"] = lambda file: save_model(file, weights, metadata, drawn)
        if engine.ema is not None:
            averaged = _copies(engine.ema.state_dict())
            files["ema.safetensors"] = lambda file: save_model(file, averaged, metadata, drawn)
        trainer = asdict(state) | {
            "epoch": stream.order.epochs(state.round),
            "world_size": world,
            "engine": engine.described,
            "adam_steps": engine.steps,
            "versions": VERSIONS,
        }
        text = json.dumps(trainer, indent=2) + "\n"
        files["trainer.json"] = lambda file: write_atomically(file, text, sync=False)
    return Snapshot(name=f"step-{state.step:08d}", files=files)


def _copied(value: Tensor) -> Tensor:
    """A contiguous copy in this process's memory."""
    return value.detach().to("cpu", copy=True).contiguous()


def _copies(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": _copied(value) for name, value in state.items()}


def describe(config: Config, stream: Stream, state: State) -> dict[str, Any]:
    """NAIGN.metadata of the model file."""
    metadata = {
        "model": asdict(config.model) | {"init": ""},
        "shape": list(stream.shape),
        "latents": asdict(config.latents),
        "prior": asdict(config.prior),
        "dataset": stream.manifest.name,
        "data": config.data.path,
        "seed": config.seed,
        "images_seen": state.images_seen,
        "fitted": state.fitted,
        "training_seconds": state.seconds,
        "cpu_seconds": state.cpu_seconds,
        "config": to_dict(config),
    }
    if config.prior.classes:
        metadata["labels"] = list(stream.manifest.labels)
    return metadata
