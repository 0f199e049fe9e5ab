"""What a checkpoint of a run holds: where it stands, weights, moments, and the round under way."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.checkpoint.writer import Write
from pipeline.config import Config, to_dict
from pipeline.data.loader import Stream
from pipeline.distributed.engine import MOMENTS, Engine
from pipeline.distributed.ranks import is_peer_lost
from pipeline.errors import InputError
from pipeline.model.naign import NAIGN, save_model

VERSIONS = {name: version(name) for name in ("naign", "torch", "accelerate")}
"""That a checkpoint was written with."""


@dataclass(kw_only=True, slots=True)
class Position:
    """Where a run stands."""

    round: int = 0
    """The next round, or the one that is under way."""

    done: int = 0
    """Steps of that round that are made."""

    images_seen: int = 0
    """Images trained on so far, over all ranks and passes."""

    step: int = 0
    """Optimizer steps so far."""

    seconds: float = 0.0
    """Wall time of the rounds so far, over all resumptions."""

    cpu_seconds: float = 0.0
    """Processor time of the rounds so far, of all threads of rank 0."""

    skipped: int = 0
    """Steps so far that were not made, since a loss or gradient was not finite."""


@dataclass(kw_only=True, slots=True)
class Under:
    """A round that is under way: what has to be kept to end it as if nothing had happened."""

    ids: Tensor | None = None
    """(round,) int64: the match of every image of the round; None where the objective needs none."""

    distances: Tensor | None = None
    """(round,) float32: squared distances of the match."""

    values: dict[str, float] = field(default_factory=dict)
    """What the match reports."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of each loss over the steps made, on this rank."""


@dataclass(kw_only=True, slots=True)
class Saved:
    """What a checkpoint says besides weights and moments."""

    position: Position
    began: int
    """The world size that began the round under way."""

    under: Under | None
    """Of a round that is under way."""


def restore_weights(checkpoint: Path, bare: nn.Module) -> Tensor | None:
    """Put a checkpoint's weights in place, before an engine takes the network; the spectrum of its latents, if any."""
    with _explained(checkpoint):
        model = NAIGN.from_pretrained(checkpoint / "model.safetensors")
        bare.load_state_dict(model.network.state_dict())
        return model.spectrum


def restore(checkpoint: Path, engine: Engine, *, rank: int, world: int, size: int) -> Saved:
    """Put the rest in place, whatever engine and world size wrote it; where the run stood, in rounds of `size` images.
    Collective.

    Raises InputError for files that are whole by the manifest but not what a checkpoint of this run holds.
    """
    with _explained(checkpoint):
        trainer = json.loads((checkpoint / "trainer.json").read_text())
        given = {"cpu_seconds": 0.0} | trainer  # which older checkpoints lack
        position = Position(**{name: type(default)(given[name]) for name, default in asdict(Position()).items()})
        sound = all(0 <= value < 2**53 for value in (*asdict(position).values(), trainer["adam_steps"]))
        if not sound or not 1 <= trainer["began"] <= 2**20 or not isinstance(trainer["match"], dict):
            raise ValueError("trainer.json holds what no run wrote")
        files = sorted((checkpoint / "state").glob("rank-*.safetensors"))
        if len(files) != trainer["world_size"]:
            raise ValueError(f"state of {len(files)} ranks instead of {trainer['world_size']}")
        opened: list[Any] = [safe_open(file, framework="pt", device="cpu") for file in files]
        places = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 (no iterator)
        weights = NAIGN.from_pretrained(checkpoint / "model.safetensors").network.state_dict()
        if trainer["adam_steps"]:
            for name, shape in engine.shapes.items():
                state = {key: places[f"{key}.{name}"].get_tensor(f"{key}.{name}") for key in MOMENTS}
                if any(value.shape != shape for value in state.values()):
                    raise ValueError(f"state of {name} has another shape than its weights {shape}")
                engine.restore(name, {"weight": weights[name], **state}, trainer["adam_steps"])
        engine.scale = trainer["scale"]
        if engine.ema is not None:
            averaged = NAIGN.from_pretrained(checkpoint / "ema.safetensors").network
            engine.ema.load_state_dict(averaged.state_dict())
        under = _restore_round(checkpoint, trainer, opened, rank, world, size) if position.done else None
        return Saved(position=position, began=int(trainer["began"]), under=under)


def _restore_round(
    checkpoint: Path, trainer: dict[str, Any], opened: Sequence[Any], rank: int, world: int, size: int
) -> Under:
    """What is known of the round under way. Sums are a rank's own, or the mean of all where their number changed."""
    stored = [file.get_tensor("sums") for file in opened]
    sums = stored[rank] if len(stored) == world else torch.stack(stored).mean(0)
    under = Under(values=trainer["match"], sums=dict(zip(trainer["terms"], sums, strict=True)))
    if (checkpoint / "state/round.safetensors").exists():
        kept = load_file(checkpoint / "state/round.safetensors")
        under.ids, under.distances = kept["ids"], kept["distances"]
        if under.ids.shape != (size,) or under.distances.shape != (size,) or int(under.ids.min()) < 0:
            raise ValueError(f"state/round.safetensors is not the match of {size} images")
    return under


class _explained:
    """Turn what a wrong file raises into an InputError that names the checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        wrong = (ValueError, TypeError, LookupError, AttributeError, EOFError, RuntimeError, SafetensorError, *missing)
        if isinstance(error, wrong) and not isinstance(error, torch.OutOfMemoryError) and not is_peer_lost(error):
            raise InputError(
                f"{self._checkpoint} cannot be resumed from ({type(error).__name__}: {error}): remove that folder to "
                "go on from the checkpoint before it"
            ) from None


def snapshot(
    config: Config,
    stream: Stream,
    engine: Engine,
    position: Position,
    spectrum: Tensor | None,
    *,
    began: int,  # the world size that began the round
    under: Under | None = None,  # of a round that is under way
) -> tuple[Callable[[], None], dict[str, Write]]:
    """Collective: what copies all that may change, and this rank's files of a checkpoint, each as what writes it then.

    Both are for the background; training goes on with the next forward, and no step is made before all is copied.
    """
    rank, world = engine.accelerator.process_index, engine.accelerator.num_processes
    owners = share_out([math.prod(shape) for shape in engine.shapes.values()], world)
    # What DeepSpeed puts together takes room on the device until it is copied.
    take: Callable[[Tensor], Tensor] = _copied if engine.deepspeed else Tensor.detach
    state, weights, averaged = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for owner, (name, values) in zip(owners, engine.states(), strict=True):
        if owner == rank:
            state |= {f"{key}.{name}": take(values[key]) for key in MOMENTS if key in values}
        if rank == 0:
            weights[name] = take(values["weight"])

    def copy() -> None:
        try:
            for part in (averaged,) if engine.deepspeed else (state, weights, averaged):
                part |= {name: _copied(value) for name, value in part.items()}
        finally:
            engine.copied.set()

    engine.copied.clear()
    sums = [value.detach().float().cpu() for value in (under.sums if under else {}).values()]
    state["sums"] = torch.stack(sums) if sums else torch.zeros(0)
    files: dict[str, Write] = {f"state/rank-{rank:05d}-of-{world:05d}.safetensors": partial(save_file, state)}
    if rank:
        return copy, files
    # Buffers are copied now: the next forward may change them.
    weights |= {name: _copied(value) for name, value in engine.bare.state_dict().items() if name not in engine.shapes}
    stands = replace(position)  # what follows is worked out in the background
    files["model.safetensors"] = lambda file: save_model(file, weights, describe(config, stream, stands), spectrum)
    if engine.ema is not None:
        averaged |= engine.ema.state_dict()
        files["ema.safetensors"] = lambda file: save_model(file, averaged, describe(config, stream, stands), spectrum)
    if under and under.ids is not None and under.distances is not None:
        files["state/round.safetensors"] = partial(save_file, {"ids": under.ids, "distances": under.distances})
    trainer = {
        **asdict(stands),
        "epoch": stream.order.epochs(position.round),
        "world_size": world,
        "began": began,
        "engine": engine.described,
        "adam_steps": engine.steps,
        "scale": engine.scale,
        "match": under.values if under else {},
        "terms": list(under.sums) if under else [],
        "versions": VERSIONS,
    }
    files["trainer.json"] = partial(_write_json, trainer)
    return copy, files


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def share_out(sizes: Sequence[int], world: int) -> list[int]:
    """The rank that writes each parameter: the largest first, each to whom has least."""
    owners, loads = [0] * len(sizes), [0] * world
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = min(range(world), key=lambda rank: loads[rank])
        loads[owners[number]] += sizes[number]
    return owners


def _copied(value: Tensor) -> Tensor:
    """In this process' memory, contiguous, nobody else's."""
    return value.detach().to("cpu", copy=True).contiguous()


def describe(config: Config, stream: Stream, position: Position) -> dict[str, Any]:
    """What a model file says of itself; NAIGN.metadata."""
    return {
        "model": asdict(config.model),
        "shape": list(stream.shape),
        "latents": config.match.latents,
        "dataset": stream.manifest.name,
        "data": config.data.path,
        "seed": config.seed,
        "images_seen": position.images_seen,
        "training_seconds": position.seconds,
        "cpu_seconds": position.cpu_seconds,
        "config": to_dict(config),
    }
