"""What a person watching a run sees: TensorBoard, metrics.jsonl, pictures and a progress bar. Only rank 0 writes."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.errors import InputError
from pipeline.storage.local import write_atomically


class Monitor:
    """Every series is drawn over images seen, so that runs of different batch sizes lie on one axis."""

    def __init__(
        self,
        folder: Path,  # the run
        *,
        active: bool,  # rank 0; elsewhere every call does nothing
        images: int,  # budget
        images_seen: int,  # at which a resumed run goes on: what was reported later is dropped
        config: str,  # the resolved configuration, as text
    ) -> None:
        self.active = active
        self.described = ""
        """How the last match was searched, as it was said."""
        self.folder = folder
        if not active:
            return
        with self._writing():
            self._metrics = folder / "metrics.jsonl"
            if self._metrics.exists():
                lines = [
                    line
                    for line in self._metrics.read_text(errors="replace").splitlines()
                    if _seen(line) <= images_seen
                ]
                write_atomically(self._metrics, "".join(f"{line}\n" for line in lines))
            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=images_seen + 1 if images_seen else None
            )
        self._board.add_text("config", f"```yaml\n{config}\n```", images_seen)
        shown: dict[str, Any] = {"dynamic_ncols": True}
        if not sys.stderr.isatty():  # a log: a line now and then
            shown = {"file": _Lines(), "mininterval": LOG_EVERY, "maxinterval": LOG_EVERY, "ncols": 100, "ascii": True}
        self._bar = tqdm(total=images, initial=images_seen, unit="img", unit_scale=True, smoothing=0.05, **shown)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what a full or failing disk raises into an InputError."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.folder}: what is reported cannot be written ({error.strerror or error}): make room; the newest "
                "checkpoint is untouched, and the same command goes on from it"
            ) from None

    def advance(self, images: int) -> None:
        """Move the bar."""
        if self.active:
            self._bar.update(images)

    def scalars(self, values: dict[str, float], images_seen: int, **more: int) -> None:
        """One point of each series, and one line of metrics.jsonl."""
        if not self.active:
            return
        with self._writing(), self._metrics.open("a") as file:
            for name, value in values.items():
                self._board.add_scalar(name, value, images_seen)
            entry = {"images_seen": images_seen, **more, **values, "time": round(time.time(), 3)}
            file.write(json.dumps(entry) + "\n")
        shown = {name.split("/")[-1]: values[name] for name in ("loss/total", "match/distance") if name in values}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)

    def histogram(self, name: str, values: Tensor, images_seen: int) -> None:
        if self.active:
            with self._writing():
                self._board.add_histogram(name, values, images_seen)

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """To TensorBoard, and as samples/NAME-IMAGES.png."""
        if not self.active:
            return
        with self._writing():
            self._picture(name, picture, images_seen)

    def _picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        self._board.add_image(name, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{name}-{images_seen:010d}.png")

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self._bar.write(text)

    def flush(self) -> None:
        """Wait until everything said so far is in TensorBoard's files. Any thread may."""
        if self.active:
            with self._writing():
                self._board.flush()

    def close(self) -> None:
        if self.active:
            self._bar.close()
            with self._writing():
                self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:  # which is the one to tell
            with contextlib.suppress(InputError):
                self.close()


LOG_EVERY = float(os.environ.get("TQDM_MININTERVAL", "10"))
"""Seconds between two lines of progress, where nobody sees a bar."""


class _Lines:
    """stderr, with a line where tqdm would draw over the one before."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None: ...


def _seen(line: str) -> float:
    """images_seen of a metrics line; infinite for a line that a kill cut short, so that it goes."""
    try:
        entry: dict[str, Any] = json.loads(line)
        return float(entry["images_seen"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
