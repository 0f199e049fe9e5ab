"""Reports of a run while it trains: metrics and pictures to trackers, and a progress bar. Only rank 0 reports."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from naign.errors import InputError, Unavailable, one_line, unwritten
from naign.observe.metrics import Metrics
from naign.observe.trackers import FILES, Settings, find_trackers, start_tracker
from naign.terminal import in_log

log = logging.getLogger("naign.monitor")

SHOWN = {
    "loss/total": "loss",
    "loss/imle": "imle",
    "match/distance": "match",
    "match/used": "used",
    "seconds/match": "seconds",
    "prior/likelihood": "likelihood",
    "prior/loss": "prior loss",
}
"""Values that the progress bar shows, and their names there."""
SINGLE = ("aim", "clearml")  # trackers of Accelerate that take no lists of pictures


class Monitor(contextlib.AbstractContextManager["Monitor"]):
    """Reports to all trackers of a run, and moves its progress bar."""

    def __init__(
        self,
        folder: Path,  # the run
        *,
        active: bool,  # on rank 0; elsewhere every call does nothing
        images: int,  # that will be learned from
        seen: int,  # of them, where a resumed run continues: later reports are dropped
        settings: Settings,  # the configuration by name: train.lr
        trackers: str = "tensorboard",  # report.trackers
    ) -> None:
        self.active = active
        self.folder = folder
        self._images = images
        self._metrics: Metrics | None = None
        port = os.environ.get("NAIGN_METRICS")
        if port and os.environ.get("LOCAL_RANK", "0") == "0":
            self._metrics = Metrics(int(port))
        self._files = list[Any]()
        self._others = dict[str, Any]()
        if active:
            self._open(trackers, seen, settings)
        self._bar = tqdm(
            total=images,
            initial=seen,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            disable=not active,
            **in_log(),
        )

    def _open(self, trackers: str, seen: int, settings: Settings) -> None:
        for name, kind in find_trackers(trackers).items():
            if name in FILES:
                with self._writing():
                    self._files.append(kind(self.folder, seen))
            else:
                with self._excused(name):
                    self._others[name] = start_tracker(name, kind, self.folder, settings)
        self._write("store_init_configuration", settings)

    def _report(self, method: str, *arguments: Any) -> None:
        """Call a method of all trackers that have it."""
        self._write(method, *arguments)
        for name, tracker in list(self._others.items()):
            if method != "log_images" or name not in SINGLE:
                with self._excused(name):
                    _call(tracker, method, *arguments)

    @contextlib.contextmanager
    def _excused(self, name: str) -> Iterator[None]:
        """Leave a tracker out that fails, with a warning: metrics.jsonl has all reports."""
        try:
            yield
        except Exception as error:  # whatever its library may raise
            self._others.pop(name, None)
            why = f"{type(error).__name__}: {one_line(error)}"
            log.warning("tracker %s failed and is left out from now on: %s", name, why)

    def _write(self, method: str, *arguments: Any) -> None:
        """Call a method of the trackers that write to the run's folder."""
        for tracker in self._files:
            with self._writing():
                _call(tracker, method, *arguments)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise `unwritten` if the disk is full or fails."""
        try:
            yield
        except OSError as error:
            why = f"{self.folder}: reports cannot be written ({error.strerror or error})"
            remedy = "make room; the newest checkpoint is untouched, and the same command goes on from it"
            raise unwritten(f"{why}: {remedy}") from None

    def advance(self, images: int) -> None:
        """Move the progress bar."""
        self._bar.update(images)

    def scalars(self, values: dict[str, float], seen: int, **counts: int) -> None:
        """One point of each series. `counts` are what was learned from, the round and the step."""
        if self._metrics:
            self._metrics.update(counts | values | {"images_goal": self._images})
        self._report("log", counts | values, seen)
        shown: dict[str, float] = {"round": counts.get("round", 0)}
        for key, name in SHOWN.items():
            if key in values:
                shown[name] = values[key]
        self._bar.set_postfix(shown, refresh=False)

    def picture(self, name: str, picture: Image.Image, seen: int) -> None:
        self._report("log_images", {name: [picture]}, seen)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self._bar.write(text)

    def flush(self) -> None:
        """Return once everything reported so far is written to the run's folder. Any thread may call it."""
        self._write("flush")

    def close(self) -> None:
        """Close all trackers."""
        self._bar.close()
        self._report("finish")
        if self._metrics:
            self._metrics.shutdown()
            self._metrics.server_close()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(InputError, Unavailable):  # the first error matters
            self.close()


def _call(tracker: Any, method: str, *arguments: Any) -> None:
    """Call a method that trackers may lack: some of Accelerate's take no pictures."""
    getattr(tracker, method, lambda *_: None)(*arguments)
