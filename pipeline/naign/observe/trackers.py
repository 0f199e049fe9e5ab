"""Trackers, to which a run reports: files in its folder, and subclasses of Accelerate's GeneralTracker.

All are told by the methods of that class. Another package adds such a subclass by an entry point of the group
`naign.trackers` (docs/tracking.md).
"""

import json
import math
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from naign.errors import InputError
from naign.settings.registry import listed, lookup
from naign.storage.local import write_atomically

Settings = Mapping[str, Any]


class JsonLines:
    """metrics.jsonl, a JSON object per report with its finite values, and pictures as samples/NAME-IMAGES.png."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        self.folder = folder
        self.file = folder / "metrics.jsonl"
        if self.file.exists():
            lines = self.file.read_text(errors="replace").splitlines()
            kept = [f"{line}\n" for line in lines if _seen(line) <= images_seen]
            write_atomically(self.file, "".join(kept))

    def log(self, values: dict[str, float], step: int) -> None:
        entry = {"images_seen": step, **values, "time": round(time.time(), 3)}
        entry = {name: value for name, value in entry.items() if math.isfinite(value)}  # JSON has no other numbers
        with self.file.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def log_images(self, values: dict[str, list[Image.Image]], step: int) -> None:
        samples = self.folder / "samples"
        samples.mkdir(exist_ok=True)
        for name, (picture,) in values.items():
            picture.save(samples / f"{name}-{step:010d}.png")


class TensorBoard:
    """Event files in tensorboard/. Accelerate's class cannot drop what a resumed run reports again."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.images_seen = images_seen
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=images_seen + 1)
        self.flush = self.board.flush
        self.finish = self.board.close

    def store_init_configuration(self, values: Settings) -> None:
        text = yaml.safe_dump(dict(values), sort_keys=False)
        self.board.add_text("config", f"```yaml\n{text}\n```", self.images_seen)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def log_images(self, values: dict[str, list[Image.Image]], step: int) -> None:
        for name, (picture,) in values.items():
            self.board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")


FILES: dict[str, Any] = {"jsonl": JsonLines, "tensorboard": TensorBoard}
"""Trackers that write to the run's folder, and without which a run fails; all others may fail."""


def find_trackers(names: str) -> dict[str, Any]:
    """The classes of report.trackers, names with commas between them. Raises InputError for an unknown one."""
    known = FILES | LOGGER_TYPE_TO_CLASS | FILES  # the files come first, and have their own class of TensorBoard
    trackers = {}
    for name in ("jsonl", *listed(names)):
        trackers[name] = lookup("report.trackers", name, known, "naign.trackers")
        if name in LOGGER_TYPE_TO_CLASS and find_spec(name) is None:
            raise InputError(f"report.trackers is '{name}', which is not installed: pip install {name}")
    return trackers


def start_tracker(name: str, kind: Any, folder: Path, settings: Settings) -> Any:
    """Start a tracker of Accelerate. W&B and MLflow continue the run whose id is in trackers/NAME."""
    file = folder / "trackers" / name
    known = None
    if file.exists():
        known = file.read_text()
    options = dict[str, Any]()
    if name == "wandb":
        options = {"name": folder.name, "id": known, "resume": "allow"}
    elif name == "mlflow":
        options = {"run_name": folder.name, "run_id": known}
    arguments = ["naign"]
    if kind.requires_logging_directory:
        arguments.append(str(folder))
    tracker = kind(*arguments, **options)
    tracker.start()
    if known:
        return tracker  # with the settings that it has: MLflow refuses changed ones
    tracker.store_init_configuration(settings)
    if options:
        run = tracker.tracker
        write_atomically(file, getattr(run, "id", None) or run.info.run_id)
    return tracker


def _seen(line: str) -> float:
    """Images learned from at a line of metrics.jsonl; infinite for one cut short by a kill, so that it is dropped."""
    try:
        entry = json.loads(line)
        return float(entry["images_seen"]) + float(entry.get("codes_seen", 0))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
