"""Checkpoints: folders of files with a manifest that is written last. Without its manifest a checkpoint does not count.

step-00001234/
  model.safetensors       float32 weights, independent of the engine and the world size
  ema.safetensors         their moving average, if one is kept
  trainer.json            images seen, round, step, world size
  state/rank-00000-of-00002.safetensors  one rank's part of the optimizer's state
  state/prior.safetensors what a prior that learns goes on from
  manifest.json           size and SHA-256 of each file above

Each rank writes its part from copies in memory, in a background thread, and uploads it if there is a bucket.
"""

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
from naign.checkpoint.manifest import MANIFEST, by_step, is_whole, prune, read_manifest, sha256
from naign.distributed.ranks import SideGroup
from naign.errors import TRANSIENT, Conflict, InputError, StoreLost, Unavailable, unwritten
from naign.observe.logs import title
from naign.storage.local import UMASK, sync_file, write_atomically
from naign.storage.prefetch import in_background

log = logging.getLogger("naign.checkpoint")

Write = Callable[[Path], None]  # writes one file


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint in the folder `checkpoints`, or None."""
    return next(filter(is_complete, _newest_first(checkpoints)), None)


def passed_over(checkpoints: Path, newest: Path | None) -> list[Path]:
    """Damaged checkpoints newer than `newest`, the newest complete one. One without manifest is being written."""
    damaged = []
    for folder in _newest_first(checkpoints):
        if folder == newest:
            break
        if (folder / MANIFEST).is_file():
            damaged.append(folder)
    return damaged


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its manifest and all files match it. OSError where the disk fails for the moment."""
    try:
        files = read_manifest((folder / MANIFEST).read_bytes())
        return all(is_whole(folder / name, entry) for name, entry in files.items())
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        return False
    except ValueError:
        return False


def _newest_first(checkpoints: Path) -> list[Path]:
    names = by_step(path.name for path in checkpoints.glob("step-*"))
    return [checkpoints / name for name in names]


class Writer:
    """Writes one checkpoint after another in the background. Every rank has a writer; its methods are collective.

    Assign before the first checkpoint what is not the default:
      newest    name of the newest checkpoint, complete or being written; of a run that resumes, the one it resumes from
      beat      called about once a second while waiting
      left      returns the seconds until the run must end; infinite without a stop request
      flush     flushes metrics and pictures before they are uploaded
      done      called with the folder of each checkpoint, on rank 0
    """

    def __init__(
        self,
        run: Path,
        *,
        rank: int = 0,
        world: int = 1,
        keep: int = 0,  # as `prune` takes it
        remote: str = "",  # s3://bucket/prefix, or '': none
        claim: str = "",  # rank 0's claim on it, from bucket.take_over
        timeout: float = 3600,  # seconds that one rank may take longer than another
    ) -> None:
        self.newest = ""
        self.beat: Callable[[], None] = lambda: None
        self.left: Callable[[], float] = lambda: math.inf
        self.flush: Callable[[], None] = lambda: None
        self.done: Callable[[Path], object] = lambda folder: None
        self.seconds = 0.0  # background seconds of the last checkpoint, uploading included
        self.uploaded = 0.0  # seconds of uploading
        self.unsent = False  # whether the newest checkpoint could not be uploaded; the same on all ranks
        self._run = run
        self._rank = rank
        self._keep = keep
        self._remote = remote
        self._claim = claim
        self._names = list[str]()  # this rank's files of the newest checkpoint
        # A separate group: the background threads communicate by it while the main threads train.
        self._group = SideGroup(world, timeout=timeout)
        self._pending: Future[None] | None = None  # a checkpoint

    def start(
        self,
        name: str,
        files: Mapping[str, Write],
    ) -> None:
        """Start to write this rank's files of checkpoint `name`, in the background. Waits for the previous
        checkpoint, and raises as `join` does.
        """
        self.join()
        folder = self._run / "checkpoints" / name
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._group.gather(None)  # no rank writes before the folder is empty
        self.newest = name
        self._pending = in_background(partial(self._work, folder, files), f"write {name}")

    def resend(self) -> None:
        """Start to upload the newest checkpoint again, which may be one that an earlier start left."""
        folder = self._run / "checkpoints" / self.newest
        names = self._names
        if not names and self._rank == 0:
            names = list(read_manifest((folder / MANIFEST).read_bytes()))
        self._pending = in_background(partial(self._upload, folder, names), f"send {self.newest}")

    def join(self, *, within: float = math.inf, share: float = 1.0) -> bool:
        """Wait for the checkpoint that is being written; it may still be `unsent` then. Returns False if that takes
        longer than `within` seconds or, once a stop was requested, longer than `share` of the time left. Raises
        `unwritten` on every rank if any rank could not write its files, what `done` raises, and what a collective
        raises when another rank is gone.
        """
        if self._pending is None:
            return True
        end = time.monotonic() + within
        stopping = False
        while not self._pending.done():
            left = end - time.monotonic()
            if left <= 0:
                return False
            wait([self._pending], min(1.0, left))
            self.beat()  # a slow upload is not a hang
            if not stopping and not math.isinf(self.left()):
                stopping = True
                end = min(end, time.monotonic() + max(1.0, share * self.left()))
        pending = self._pending
        self._pending = None
        pending.result()
        return True

    def finish(self) -> bool:
        """Wait for the last checkpoint and its copy, which is sent once more where that failed: whoever starts this run
        again may have only the bucket. Returns False where a stop request leaves too little time. Raises StoreLost on
        every rank if the bucket does not hold the checkpoint in the end, and as `join` does.
        """
        if not self.join():
            return False
        if self.unsent:
            self.resend()
            if not self.join():
                return False
        if self.unsent:
            folder = self._run / "checkpoints" / self.newest
            raise StoreLost(f"{folder} could not be sent to {self._remote}: start again to send it once more")
        return True

    def _work(
        self,
        folder: Path,
        files: Mapping[str, Write],
    ) -> None:
        title("write")
        start = time.perf_counter()
        self._write(folder, files)
        self._names = list(files)
        if self._remote:
            self._upload(folder, self._names)
        self.seconds = time.perf_counter() - start
        if self._rank == 0:
            self.done(folder)

    def _write(
        self,
        folder: Path,
        files: Mapping[str, Write],
    ) -> None:
        """Write the local checkpoint, its manifest last. Where that fails on any rank, all raise `unwritten`, or
        RuntimeError if it was something other than the disk, such as a device.
        """
        entries = dict[str, dict[str, Any]]()  # of the manifest

        def write_mine() -> None:
            for name, write in files.items():
                entries[name] = _write_file(folder / name, write)

        def complete() -> None:
            text = json.dumps({"files": dict(sorted(entries.items()))}, indent=2)
            write_atomically(folder / MANIFEST, text + "\n")

        is_first = self._rank == 0
        error = self._agreed(True, write_mine)
        if not error:
            for theirs in self._group.gather(entries):
                entries |= theirs
            error = self._agreed(is_first, complete)
        if error:
            if is_first:
                shutil.rmtree(folder, ignore_errors=True)
            remedy = "make room or choose another --run.path; the checkpoint before it is untouched"
            problem = f"{folder} could not be written ({error}): {remedy}"
            raise RuntimeError(problem) if isinstance(error, RuntimeError) else unwritten(problem)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # a machine may have a folder of its own
            with _may_fail(f"old checkpoints stay in {folder.parent}"):
                prune(str(folder.parent.absolute()), self._keep, newest=folder.name)

    def _upload(self, folder: Path, names: list[str]) -> None:
        """Upload a checkpoint: each rank its own files, then rank 0 the manifest. If that fails, it stays local. All
        ranks raise Conflict where another process has taken the bucket over.
        """
        title("upload")
        start = time.perf_counter()
        is_first = self._rank == 0
        error = self._agreed(is_first, lambda: bucket.check_claim(self._remote, self._claim))
        if not error:
            error = self._agreed(True, lambda: bucket.upload(folder, self._remote, names))
        if not error:
            error = self._agreed(is_first, lambda: self._finish_remote(folder))
        self.uploaded = time.perf_counter() - start
        if isinstance(error, Conflict):
            raise Conflict(f"{error}; its newest checkpoint is {folder}")
        self.unsent = error is not None
        if error and is_first:
            log.warning("%s stays local: %s: %s", folder, self._remote, error)

    def _finish_remote(self, folder: Path) -> None:
        self.flush()
        bucket.mirror(self._run, self._remote, bucket.RECORDS)
        bucket.check_claim(self._remote, self._claim)  # uploading may have taken long
        bucket.upload(folder, self._remote, [MANIFEST])
        with _may_fail(f"old checkpoints stay in {self._remote}"):
            prune(f"{self._remote}/checkpoints", self._keep, newest=folder.name)
        with _may_fail(f"pictures and TensorBoard's files in {self._remote} are old"):
            bucket.mirror(self._run, self._remote, bucket.PICTURES)

    def _agreed(self, active: bool, act: Callable[[], None]) -> Exception | None:
        """Collective: call `act` on the ranks that are active. Returns the first rank's error on all of them: Conflict,
        Unavailable for a store or a disk, else RuntimeError.
        """
        mine: Exception | None = None
        try:
            if active:
                act()
        except Conflict as error:
            mine = Conflict(str(error))
        except (InputError, Unavailable) as error:
            mine = Unavailable(str(error))
        except Exception as error:
            kind = Unavailable if isinstance(error, OSError | SafetensorError) else RuntimeError
            mine = kind(f"rank {self._rank}: {type(error).__name__}: {error}")
        for theirs in self._group.gather(mine):
            if theirs:
                return theirs
        return None


def _write_file(file: Path, write: Write) -> dict[str, Any]:
    """Write a file to the disk; its entry in the manifest."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file)
    file.chmod(0o666 & ~UMASK)  # safetensors writes mode 0600
    sync_file(file)
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


@contextmanager
def _may_fail(consequence: str) -> Iterator[None]:
    """Log a failure that does not harm the new checkpoint."""
    try:
        yield
    except (OSError, InputError, Unavailable) as error:
        log.warning("%s: %s", consequence, error)
