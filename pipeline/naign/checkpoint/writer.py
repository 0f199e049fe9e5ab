"""Checkpoints: folders of files with a manifest that is written last. Without its manifest a checkpoint does not count.

step-00001234/
  model.safetensors       float32 weights, independent of the engine and the world size
  ema.safetensors         their moving average, if one is kept
  trainer.json            images seen, round, step, world size
  state/rank-00000-of-00002.safetensors  one rank's part of the optimizer's state and of the round's losses
  state/prior.safetensors what a prior that learns goes on from
  state/round.safetensors the match of a round that stopped between two steps
  manifest.json           size and SHA-256 of each file above

Each rank writes its part from copies in memory, in a background thread, and uploads it if there is a bucket.
"""

import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from naign.checkpoint import bucket
from naign.checkpoint.manifest import BEST, MANIFEST, best_named, by_step, is_whole, prune, read_manifest, sha256
from naign.distributed.ranks import SideGroup
from naign.errors import Conflict, InputError, Unavailable, unwritten
from naign.observe.logs import title
from naign.storage.local import TRANSIENT, UMASK, sync_file, write_atomically
from naign.storage.prefetch import in_background

log = logging.getLogger("naign.checkpoint")

Write = Callable[[Path], None]  # writes one file


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint in the folder `checkpoints`, or None."""
    return next((folder for folder in _newest_first(checkpoints) if is_complete(folder)), None)


def passed_over(checkpoints: Path, newest: Path | None) -> list[Path]:
    """Damaged checkpoints newer than `newest`, the newest complete one. One without manifest is being written."""
    newer = itertools.takewhile(lambda folder: folder != newest, _newest_first(checkpoints))
    return [folder for folder in newer if (folder / MANIFEST).is_file()]


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its manifest and all files match it. OSError where the disk fails for the moment."""
    try:
        files = read_manifest((folder / MANIFEST).read_bytes())
        return all(is_whole(folder / name, entry) for name, entry in files.items())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            raise
        return False


def _newest_first(checkpoints: Path) -> list[Path]:
    return [checkpoints / name for name in by_step(path.name for path in checkpoints.glob("step-*"))]


class Writer:
    """Writes one checkpoint after another in the background. Every rank has a writer; its methods are collective."""

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        world: int,
        keep: int,  # as `prune` takes it
        remote: str,  # s3://bucket/prefix, or ''
        claim: str = "",  # rank 0's claim on it, from bucket.take_over
        newest: str = "",  # name of the checkpoint that the run resumes from
        beat: Callable[[], None] = lambda: None,  # called about once a second while waiting
        left: Callable[[], float] = lambda: math.inf,  # seconds until the run must end; infinite without a stop request
        patience: float = 3600,  # seconds that one rank may take longer than another
        flush: Callable[[], None] = lambda: None,  # flushes metrics and pictures before they are uploaded
    ) -> None:
        self._run, self._rank, self._world = run, rank, world
        self._keep, self._remote, self._claim = keep, remote, claim
        self.newest = newest  # name of the newest checkpoint, complete or being written
        self._names = list[str]()  # this rank's files of the newest checkpoint
        # A separate group: the background threads communicate by it while the main threads train.
        self._group = SideGroup(world, timeout=patience)
        self._beat, self._flush, self._left = beat, flush, left
        self._done: Future[str] | None = None  # of the pending checkpoint: why the run must end, or ""
        self.completed = time.monotonic()  # when the newest checkpoint was there and sent, or when this start began
        self.done: Callable[[Path], object] = lambda folder: None  # called after a checkpoint, on rank 0
        self.seconds = 0.0  # background seconds of the last checkpoint, uploading included
        self.uploaded = 0.0  # seconds of uploading
        self.unsent = ""  # name of the newest checkpoint if it could not be uploaded; the same on all ranks

    def start(self, name: str, copy: Callable[[], None], files: Mapping[str, Write], best: str = "") -> None:
        """Start to write this rank's files of checkpoint `name`. `copy` is called first, in the background.

        `best`, on rank 0, is the text of best.json where this is the best checkpoint: once this is complete, it is
        written and the former best one removed. Waits for the previous checkpoint, and raises as `join` does.
        """
        self.join()
        folder = self._run / "checkpoints" / name
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._group.gather(None)  # no rank writes before the folder is empty
        self.newest = name
        self._done = in_background(partial(self._work, folder, copy, files, best), f"write {name}")

    def resend(self, name: str) -> None:
        """Start to upload a checkpoint again: this run's newest one, or one that an earlier start left."""
        folder = self._run / "checkpoints" / name
        names = self._names
        if not names and self._rank == 0:
            names = list(read_manifest((folder / MANIFEST).read_bytes()))
        self._done = in_background(partial(self._upload, folder, names), f"send {name}")

    def join(self, *, within: float = math.inf, share: float = 1.0) -> bool:
        """Wait for the checkpoint that is being written. Returns False if that takes longer than `within` seconds or,
        once a stop was requested, longer than `share` of the time left. Raises `unwritten` on every rank if any rank
        could not write its files, what `done` raises, and what a collective raises when another rank is gone.
        """
        if self._done is None:
            return True
        end, stopping = time.monotonic() + within, False
        while not wait([self._done], max(0.0, min(1.0, end - time.monotonic()))).done and time.monotonic() < end:
            self._beat()  # a slow upload is not a hang
            if not stopping and not math.isinf(left := self._left()):
                end, stopping = min(end, time.monotonic() + max(1.0, share * left)), True
        if not self._done.done():
            return False
        done, self._done = self._done, None
        if failed := done.result():
            raise unwritten(failed)
        return True

    def _work(self, folder: Path, copy: Callable[[], None], files: Mapping[str, Write], best: str) -> str:
        title("write")
        start = time.perf_counter()
        if problem := self._write(folder, copy, files, best):
            remedy = "make room or choose another --run.path; the checkpoint before it is untouched"
            return f"{folder} could not be written ({problem}): {remedy}"
        self._names = list(files)
        conflict = self._upload(folder, self._names) if self._remote else ""
        if not self.unsent:
            self.completed = time.monotonic()
        self.seconds = time.perf_counter() - start
        if self._rank == 0 and not conflict:
            self.done(folder)
        return conflict

    def _write(self, folder: Path, copy: Callable[[], None], files: Mapping[str, Write], best: str) -> str:
        """Write the local checkpoint, its manifest last. Returns what failed on any rank, the same on all ranks, which
        raise RuntimeError if it was something other than the disk, such as a device.
        """
        entries, failed, fault = dict[str, Any](), "", False
        try:
            copy()  # first: the next step waits for it
            for name, write in files.items():
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                write(file)
                file.chmod(0o666 & ~UMASK)  # safetensors writes mode 0600
                sync_file(file)
                entries[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        except Exception as error:
            failed = f"rank {self._rank}: {type(error).__name__}: {error}"
            fault = not isinstance(error, OSError | SafetensorError)
        gathered = self._group.gather((entries, failed, fault))
        problem = next((failed for _, failed, _ in gathered if failed), "")
        names = set[str]()
        if self._rank == 0:
            if not problem:
                listed = dict(sorted((name, entry) for part, *_ in gathered for name, entry in part.items()))
                try:
                    write_atomically(folder / MANIFEST, json.dumps({"files": listed}, indent=2) + "\n")
                except OSError as error:
                    problem = f"{type(error).__name__}: {error}"
            if problem:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                with _may_fail(f"old checkpoints stay in {folder.parent}"):
                    if best:
                        write_atomically(self._run / BEST, best)
                    root = self._run.absolute()
                    prune(f"{root}/checkpoints", self._keep, newest=folder.name, spare=best_named(str(root)))
            names = {path.name for path in _newest_first(folder.parent)}
        if any(fault for *_, fault in gathered):
            raise RuntimeError(f"{folder} could not be written ({problem}); the checkpoint before it is untouched")
        problem, names = self._group.gather((problem, names))[0]
        if not problem and os.environ.get("LOCAL_RANK") == "0":  # a machine may have a folder of its own
            for path in _newest_first(folder.parent):
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)
        return problem

    def _upload(self, folder: Path, names: list[str]) -> str:
        """Upload a checkpoint: each rank its own files, then rank 0 the manifest. If that fails, it stays local.
        Returns why the run must end, the same on all ranks: another process has taken the bucket over.
        """
        title("upload")
        start = time.perf_counter()
        failed, conflict = self._agreed(lambda: bucket.check_claim(self._remote, self._claim))
        if not failed:
            failed, conflict = self._agreed(lambda: bucket.upload(folder, self._remote, names), everyone=True)
        if not failed:
            failed, conflict = self._agreed(lambda: self._finish_remote(folder))
        self.uploaded = time.perf_counter() - start
        if conflict:
            return f"{failed}; its newest checkpoint is {folder}"
        self.unsent = folder.name if failed else ""
        if failed and self._rank == 0:
            log.warning("%s stays local: %s: %s", folder, self._remote, failed)
        return ""

    def _finish_remote(self, folder: Path) -> None:
        self._flush()
        bucket.mirror(self._run, self._remote, bucket.RECORDS)
        bucket.check_claim(self._remote, self._claim)  # uploading may have taken long
        bucket.upload(folder, self._remote, [MANIFEST])
        with _may_fail(f"old checkpoints stay in {self._remote}"):
            best = bucket.send_best(self._run, self._remote)
            prune(f"{self._remote}/checkpoints", self._keep, newest=folder.name, spare=best)
        with _may_fail(f"pictures and TensorBoard's files in {self._remote} are old"):
            bucket.mirror(self._run, self._remote, bucket.PICTURES)

    def _agreed(self, act: Callable[[], None], *, everyone: bool = False) -> tuple[str, bool]:
        """Collective: call `act` on rank 0 or on all. Returns the first error, or "", and whether it is a Conflict."""
        mine = "", False
        try:
            if everyone or self._rank == 0:
                act()
        except Exception as error:
            mine = str(error) or type(error).__name__, isinstance(error, Conflict)
        return next((one for one in self._group.gather(mine) if one[0]), ("", False))


@contextmanager
def _may_fail(consequence: str) -> Iterator[None]:
    """Log a failure that does not harm the new checkpoint."""
    try:
        yield
    except (OSError, InputError, Unavailable) as error:
        log.warning("%s: %s", consequence, error)
