"""The folder of a run: who may use it, and what a checkpoint of it holds."""

import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.config import Config, differences, from_dict, to_dict
from pipeline.data.stream import Stream
from pipeline.errors import InputError
from pipeline.model.naign import NAIGN, save_model
from pipeline.runtime.checkpoint import newest_checkpoint, prune_checkpoints, write_atomically, write_checkpoint


@dataclass(kw_only=True, slots=True)
class Position:
    """Where a run stands between two rounds."""

    round: int = 0
    """The next round."""

    images_seen: int = 0
    """Images trained on so far, over all ranks and passes."""

    step: int = 0
    """Optimizer steps so far."""

    seconds: float = 0.0
    """Wall time of the rounds so far, over all resumptions."""


@dataclass(kw_only=True, slots=True)
class Learned:
    """All that training changes, besides the position."""

    network: nn.Module
    """The bare network, not the engine's wrapper of it."""

    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    spectrum: Tensor | None = None
    """Of the fourier law, measured on the first round."""


def claim(config: Config) -> tuple[Path | None, FileLock]:
    """Make the run's folder this configuration's: the checkpoint to resume from, if any, and a lock to hold.

    Raises InputError, changing nothing, if the folder is in use, belongs to another configuration or may not be used
    again. The lock goes with the process, however that ends.
    """
    folder = Path(config.run.path)
    newest = newest_checkpoint(folder / "checkpoints")
    if config.resume == "never" and (newest or (folder / "metrics.jsonl").exists()):
        raise InputError(
            f"'{folder}' already holds a run and resume=never does not overwrite it: choose another --run.path, or "
            "delete that folder"
        )
    if newest:
        # The checkpoint's own record, not config.yaml, which anyone may edit.
        recorded = NAIGN.from_pretrained(newest / "model.safetensors").metadata["config"]
        changed = differences(from_dict(recorded, where=str(newest)), config)
        if changed:
            raise InputError(
                f"'{folder}' holds a run of another configuration:\n  "
                + "\n  ".join(changed)
                + "\nchoose another --run.path, or take these settings back to go on with that run"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
        write_atomically(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    except Timeout:
        raise InputError(
            f"'{folder}' is in use by another process: wait for it, or choose another --run.path"
        ) from None
    except OSError as error:
        raise InputError(f"run.path '{folder}' cannot be written: {error}") from None
    return newest, lock


def restore(checkpoint: Path, learned: Learned) -> Position:
    """Put a checkpoint's weights and optimizer state in place; where the run stood. Float32 weights restore exactly.

    Raises InputError for files that are whole by the manifest but not what a checkpoint of this run holds.
    """
    try:
        return _restore(checkpoint, learned)
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{checkpoint} cannot be resumed from ({type(error).__name__}: {error}): remove that folder to go on from "
            "the checkpoint before it"
        ) from None


def _restore(checkpoint: Path, learned: Learned) -> Position:
    model = NAIGN.from_pretrained(checkpoint / "model.safetensors")
    learned.network.load_state_dict(model.network.state_dict())
    learned.spectrum = model.spectrum
    if learned.ema:
        averaged = NAIGN.from_pretrained(checkpoint / "ema.safetensors").network
        learned.ema.module.load_state_dict(averaged.state_dict())
        learned.ema.n_averaged += 1  # else the next update would start the average anew
    state = torch.load(checkpoint / "state" / "optimizer.pt", map_location="cpu", weights_only=True)
    learned.optimizer.load_state_dict(state)
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    return Position(**{name: type(default)(trainer[name]) for name, default in asdict(Position()).items()})


def save(config: Config, stream: Stream, learned: Learned, position: Position, *, world: int) -> None:
    """Write checkpoints/step-XXXXXXXX whole or not at all, then remove old ones."""
    metadata = describe(config, stream, position)

    def fill(folder: Path) -> None:
        save_model(folder / "model.safetensors", learned.network.state_dict(), metadata, learned.spectrum)
        if learned.ema:
            averaged = learned.ema.module.state_dict()
            save_model(folder / "ema.safetensors", averaged, metadata, learned.spectrum)
        (folder / "state").mkdir()
        torch.save(learned.optimizer.state_dict(), folder / "state" / "optimizer.pt")
        trainer = {**asdict(position), "epoch": stream.order.epochs(position.round), "world_size": world}
        (folder / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n")

    checkpoints = Path(config.run.path) / "checkpoints"
    write_checkpoint(checkpoints / f"step-{position.step:08d}", fill)
    prune_checkpoints(checkpoints, config.checkpoint.keep)


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
        "config": to_dict(config),
    }
