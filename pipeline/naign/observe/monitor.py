"""Reports of a run while it trains: metrics and pictures to trackers, and a progress bar. Only rank 0 reports."""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from naign.errors import InputError, Unavailable, one_line, unwritten
from naign.observe.heartbeat import Heartbeat
from naign.observe.trackers import TRACKERS, Tracker, find_trackers

log = logging.getLogger("naign.monitor")

WAITING = 256  # most reports that wait for a tracker; a round makes up to five
PATIENCE = 5.0  # seconds that a run waits at its end for all trackers together
LOG_EVERY = float(os.environ.get("TQDM_MININTERVAL", "10"))  # seconds between lines if stderr is no terminal


class Monitor(contextlib.AbstractContextManager["Monitor"]):
    """Reports to all trackers of a run, and moves its progress bar."""

    def __init__(
        self,
        folder: Path,  # the run
        *,
        active: bool,  # on rank 0; elsewhere every call does nothing
        images: int,  # that will be learned from
        seen: int,  # of them, where a resumed run continues: later reports are dropped
        config: str,  # the resolved configuration, as YAML
        settings: Mapping[str, Any],  # the same by name: train.lr
        trackers: str = "tensorboard",  # report.trackers
    ) -> None:
        self.active, self.folder = active, folder
        self.described = ""  # the last message about the method of a match
        file, first = os.environ.get("NAIGN_HEARTBEAT"), os.environ.get("LOCAL_RANK", "0") == "0"
        self.heartbeat = Heartbeat(Path(file), images=images, seen=seen) if file and first else None
        self._files: list[Tracker] = []  # in the run's folder
        self._others: list[Background] = []
        for name, (kind, build) in find_trackers(trackers).items() if active else ():
            open_tracker = partial(build, kind() if kind else None, folder, seen)
            if name in TRACKERS:
                with self._writing():
                    self._files.append(open_tracker())
            else:
                self._others.append(Background(name, open_tracker))
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        self._report(lambda tracker: tracker.configuration(plain, config))
        bar: dict[str, Any] = {"dynamic_ncols": True}
        if not sys.stderr.isatty():  # a log: a line every LOG_EVERY seconds
            bar = {"file": _Lines(), "mininterval": LOG_EVERY, "maxinterval": LOG_EVERY, "ncols": 100, "ascii": True}
        bar |= {"unit": "img", "unit_scale": True, "smoothing": 0.05, "disable": not active}
        self._bar = tqdm(total=images, initial=seen, **bar)

    def _report(self, act: Callable[[Tracker], None]) -> None:
        for tracker in self._files:
            with self._writing():
                act(tracker)
        for other in self._others:
            other.put(act)

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
        self._report(lambda tracker: tracker.scalars(values, seen, counts))
        shown = {name.split("/")[-1]: values[name] for name in ("loss/total", "match/distance") if name in values}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)

    def histogram(self, name: str, values: Tensor, seen: int) -> None:
        self._report(lambda tracker: tracker.histogram(name, values, seen))

    def picture(self, name: str, picture: Image.Image, seen: int) -> None:
        self._report(lambda tracker: tracker.picture(name, picture, seen))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self._bar.write(text)

    def flush(self) -> None:
        """Return once everything reported so far is written to the run's folder. Any thread may call it."""
        self._report(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Close all trackers. Waits at most PATIENCE seconds for those with a thread."""
        self._bar.close()
        until = time.monotonic() + PATIENCE
        for other in self._others:
            other.end()
        for tracker in self._files:
            with self._writing():
                tracker.close()
        for other in self._others:
            other.wait(until)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with contextlib.suppress(*(InputError, Unavailable) if kind else ()):  # the first error matters
            self.close()


class _Lines:
    """stderr for tqdm, with a line for each update."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None: ...


class Background(threading.Thread):
    """A tracker's thread, which passes it all reports in order. Reports are dropped while the queue is full."""

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)
        self.dropped, self.failed, self._build = 0, False, build
        self._queue: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self.start()

    def put(self, act: Callable[[Tracker], None]) -> None:
        """Queue a call of the tracker, or drop it. Returns at once; any thread may call it."""
        if self.failed:
            return
        if self._queue.qsize() < WAITING:
            self._queue.put(act)
            return
        self.dropped += 1
        if self.dropped == 1:
            log.warning("%s does not keep up: reports are dropped while %d wait", self.name, WAITING)

    def end(self) -> None:
        """Close the tracker after everything in the queue. Returns at once."""
        self._queue.put(None)

    def wait(self, until: float) -> None:
        """Wait for the tracker to close, at most until a time of time.monotonic()."""
        self.join(max(0.0, until - time.monotonic()))
        if self.is_alive():
            log.warning("%s has not finished after %.0f s: the run ends without it", self.name, PATIENCE)
            self.dropped += self._queue.qsize()
        if self.dropped:
            log.warning("%s has missed %d reports: metrics.jsonl has all of them", self.name, self.dropped)

    def run(self) -> None:
        try:
            tracker = self._build()
            for act in iter(self._queue.get, None):
                act(tracker)
            tracker.close()
        except BaseException as error:  # any, such as the panics of Rust, which are no Exception
            self.failed = True
            why = f"{type(error).__name__}: {one_line(error)}"
            log.warning("%s failed and is left out from now on: %s", self.name, why)
            self._queue = queue.SimpleQueue()  # frees what is waiting


def trackers_hang() -> bool:
    """Whether a tracker's thread still runs: its library may also block the interpreter's shutdown."""
    return any(isinstance(thread, Background) for thread in threading.enumerate())
