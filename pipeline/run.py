"""The folder of a run: who may use it, and what a checkpoint of it holds."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.config import Config, differences, load, to_dict
from pipeline.data.manifest import Manifest
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


def claim(config: Config) -> Path | None:
    """Make the run's folder this configuration's; the checkpoint to resume from, or None for a new run.

    Raises InputError, changing nothing, if the folder belongs to another configuration or may not be used again.
    """
    folder = Path(config.run.path)
    newest = newest_checkpoint(folder / "checkpoints")
    kept = folder / "config.yaml"
    if config.resume == "never" and (newest or (folder / "metrics.jsonl").exists()):
        raise InputError(
            f"'{folder}' already holds a run and resume=never does not overwrite it: choose another --run.path, or "
            "delete that folder"
        )
    if kept.exists():
        changed = differences(load(str(kept)), config)
        if changed and newest:
            raise InputError(
                f"'{folder}' holds a run of another configuration:\n  "
                + "\n  ".join(changed)
                + "\nchoose another --run.path, or take these settings back to go on with that run"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, yaml.safe_dump(to_dict(config), sort_keys=False))
    except OSError as error:
        raise InputError(f"run.path '{folder}' cannot be written: {error}") from None
    return newest


def restore(checkpoint: Path, learned: Learned, device: torch.device) -> Position:
    """Put a checkpoint's weights and optimizer state in place; where the run stood. Float32 weights restore exactly."""
    model = NAIGN.from_pretrained(checkpoint / "model.safetensors")
    learned.network.load_state_dict(model.network.state_dict())
    learned.spectrum = model.spectrum
    if learned.ema:
        averaged = NAIGN.from_pretrained(checkpoint / "ema.safetensors").network
        learned.ema.module.load_state_dict(averaged.state_dict())
        learned.ema.n_averaged += 1  # else the next update would start the average anew
    state = torch.load(checkpoint / "state" / "optimizer.pt", map_location=device, weights_only=True)
    learned.optimizer.load_state_dict(state)
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    return Position(**{name: trainer[name] for name in asdict(Position())})


def save(config: Config, manifest: Manifest, learned: Learned, position: Position, *, world: int) -> None:
    """Write checkpoints/step-XXXXXXXX whole or not at all, then remove old ones."""
    metadata = describe(config, manifest, position)

    def fill(folder: Path) -> None:
        save_model(folder / "model.safetensors", learned.network.state_dict(), metadata, learned.spectrum)
        if learned.ema:
            averaged = learned.ema.module.state_dict()
            save_model(folder / "ema.safetensors", averaged, metadata, learned.spectrum)
        (folder / "state").mkdir()
        torch.save(learned.optimizer.state_dict(), folder / "state" / "optimizer.pt")
        trainer = {**asdict(position), "world_size": world}
        (folder / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n")

    checkpoints = Path(config.run.path) / "checkpoints"
    write_checkpoint(checkpoints / f"step-{position.step:08d}", fill)
    prune_checkpoints(checkpoints, config.checkpoint.keep)


def describe(config: Config, manifest: Manifest, position: Position) -> dict[str, Any]:
    """What a model file says of itself; NAIGN.metadata."""
    return {
        "model": asdict(config.model),
        "shape": list(manifest.shape),
        "latents": config.match.latents,
        "dataset": manifest.name,
        "data": config.data.path,
        "seed": config.seed,
        "images_seen": position.images_seen,
        "training_seconds": position.seconds,
        "config": to_dict(config),
    }
