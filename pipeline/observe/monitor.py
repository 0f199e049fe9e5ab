"""What a run reports while it trains: metrics and pictures, to trackers, and a progress bar. Only rank 0 reports.

Another package adds a tracker by an entry point of the group `naign.trackers`, a pair (settings dataclass or None,
build) as those in TRACKERS:

    [project.entry-points."naign.trackers"]
    mine = "my_package.tracking:MINE"
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import InputError
from pipeline.registry import lookup
from pipeline.storage.local import write_atomically

log = logging.getLogger("naign.monitor")


class Tracker(Protocol):
    """Where a run reports to. Every series is over images seen, so that runs of any batch size share an axis."""

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        """One point of each series; `counts` are the round and the step."""

    def histogram(self, name: str, values: Tensor, images_seen: int) -> None: ...

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None: ...

    def text(self, name: str, text: str, images_seen: int) -> None:
        """Markdown."""

    def flush(self) -> None:
        """Return once everything reported so far is written. Called from any thread."""

    def close(self) -> None: ...


class JsonLines(Tracker):
    """metrics.jsonl, one JSON object a report, and pictures as samples/NAME-IMAGES.png. Always on."""

    def __init__(self, settings: None, folder: Path, images_seen: int) -> None:
        self.folder, self.file = folder, folder / "metrics.jsonl"
        if self.file.exists():
            lines = self.file.read_text(errors="replace").splitlines()
            write_atomically(self.file, "".join(f"{line}\n" for line in lines if _seen(line) <= images_seen))

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        entry = {"images_seen": images_seen, **counts, **values, "time": round(time.time(), 3)}
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        (self.folder / "samples").mkdir(exist_ok=True)
        picture.save(self.folder / "samples" / f"{name}-{images_seen:010d}.png")


class TensorBoard:
    """Event files in tensorboard/."""

    def __init__(self, settings: None, folder: Path, images_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = images_seen + 1 if images_seen else None  # drops what was reported after the checkpoint
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        self.histogram, self.text = self.board.add_histogram, self.board.add_text
        self.flush, self.close = self.board.flush, self.board.close

    def scalars(self, values: dict[str, float], images_seen: int, counts: dict[str, int]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, images_seen)

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        self.board.add_image(name, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")


Build = Callable[[Any, Path, int], Tracker]
"""Makes a tracker from its settings (the defaults), the run's folder and the images seen at which the run resumes."""

TRACKERS: dict[str, tuple[type | None, Build]] = {"jsonl": (None, JsonLines), "tensorboard": (None, TensorBoard)}


def find_trackers(names: str) -> dict[str, tuple[type | None, Build]]:
    """The trackers of report.trackers, names with commas between them. Raises InputError for an unknown one."""
    wanted = dict.fromkeys(["jsonl", *filter(None, map(str.strip, names.split(",")))])
    return {name: lookup("report.trackers", name, TRACKERS, "naign.trackers") for name in wanted}


class Monitor(contextlib.AbstractContextManager["Monitor"]):
    """Reports to all trackers of a run, and moves its progress bar."""

    def __init__(
        self,
        folder: Path,  # the run
        *,
        active: bool,  # rank 0; elsewhere every call does nothing
        images: int,  # budget
        images_seen: int,  # where a resumed run continues: later reports are dropped
        config: str,  # the resolved configuration, as YAML
        trackers: str = "tensorboard",  # report.trackers
    ) -> None:
        self.active, self.folder = active, folder
        self.described = ""  # the last message about how a match was searched
        self._trackers: dict[str, Tracker] = {}
        for name, (settings, build) in find_trackers(trackers).items() if active else ():
            with self._writing(name):
                self._trackers[name] = build(settings() if settings else None, folder, images_seen)
        self._report(lambda tracker: tracker.text("config", f"```yaml\n{config}\n```", images_seen))
        bar: dict[str, Any] = {"dynamic_ncols": True}
        if not sys.stderr.isatty():  # a log: a line now and then
            bar = {"file": _Lines(), "mininterval": LOG_EVERY, "maxinterval": LOG_EVERY, "ncols": 100, "ascii": True}
        bar |= {"unit": "img", "unit_scale": True, "smoothing": 0.05, "disable": not active}
        self._bar = tqdm(total=images, initial=images_seen, **bar)

    def _report(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._writing(name):
                act(tracker)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Raise InputError if the disk is full or fails. A tracker of another package must not end the run."""
        try:
            yield
        except Exception as error:
            if name not in TRACKERS:
                self._trackers.pop(name, None)
                why = f"{type(error).__name__}: {error}"
                log.warning("tracker %s failed, and is left out from here on: %s", name, why)
            elif isinstance(error, OSError):
                raise InputError(
                    f"{self.folder}: what is reported cannot be written ({error.strerror or error}): make room; the "
                    "newest checkpoint is untouched, and the same command goes on from it"
                ) from None
            else:
                raise

    def advance(self, images: int) -> None:
        """Move the progress bar."""
        self._bar.update(images)

    def scalars(self, values: dict[str, float], images_seen: int, **counts: int) -> None:
        """One point of each series. `counts` are the round and the step."""
        self._report(lambda tracker: tracker.scalars(values, images_seen, counts))
        shown = {name.split("/")[-1]: values[name] for name in ("loss/total", "match/distance") if name in values}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)

    def histogram(self, name: str, values: Tensor, images_seen: int) -> None:
        self._report(lambda tracker: tracker.histogram(name, values, images_seen))

    def picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        self._report(lambda tracker: tracker.picture(name, picture, images_seen))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self._bar.write(text)

    def flush(self) -> None:
        """Return once everything reported so far is written. Any thread may call it."""
        self._report(lambda tracker: tracker.flush())

    def close(self) -> None:
        self._bar.close()
        self._report(lambda tracker: tracker.close())

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with contextlib.suppress(*[InputError] if kind else []):  # the first error is the one to report
            self.close()


LOG_EVERY = float(os.environ.get("TQDM_MININTERVAL", "10"))  # seconds between lines where stderr is no terminal


class _Lines:
    """stderr for tqdm, with a line of its own for each update."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None: ...


def _seen(line: str) -> float:
    """images_seen of a line of metrics.jsonl; infinite for one that a kill cut short, so that it is dropped."""
    try:
        return float(json.loads(line)["images_seen"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
