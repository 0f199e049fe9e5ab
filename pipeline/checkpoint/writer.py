"""Checkpoints: a folder of files and a manifest written last. Without the manifest there is no checkpoint.

step-00001234/
  model.safetensors       float32 weights, independent of how they were trained
  ema.safetensors         their moving average, if one is kept
  trainer.json            images seen, round, step, world size
  state/rank-00000-of-00002.safetensors  what a rank wrote of all that is needed to go on bit for bit
  manifest.json           size and sha256 of each file above

They are written in the background from copies in memory, by each rank its own files, also to a bucket if there is one.
"""

import itertools
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint import bucket
from pipeline.checkpoint.manifest import MANIFEST, Entries, is_whole, read_manifest, sha256
from pipeline.errors import Conflict, InputError, Unavailable
from pipeline.observe.logs import title
from pipeline.storage.local import UMASK, sync_file, write_atomically

log = logging.getLogger("naign.checkpoint")


Write = Callable[[Path], None]
"""Writes one file."""


def write_checkpoint(
    folder: Path,  # .../checkpoints/step-00001234
    fill: Callable[[Path], None],  # writes the files into the folder it is given
) -> None:
    """Write a checkpoint so that a kill at any moment leaves either all of it or none that counts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fill(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_manifest(folder, {file.relative_to(folder).as_posix(): _settle(file) for file in files})


def write_manifest(folder: Path, entries: Entries) -> None:
    """Make the checkpoint count."""
    write_atomically(folder / MANIFEST, json.dumps({"files": dict(sorted(entries.items()))}, indent=2) + "\n")


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint below `checkpoints`, or None."""
    return next((folder for folder in newest_first(checkpoints) if is_complete(folder)), None)


def passed_over(checkpoints: Path, newest: Path | None) -> list[Path]:
    """What is newer than the newest complete one and has a manifest, so that nobody is writing it any more."""
    newer = itertools.takewhile(lambda folder: folder != newest, newest_first(checkpoints))
    return [folder for folder in newer if (folder / MANIFEST).is_file()]


def set_aside(checkpoints: Path, newest: Path | None, *, parts: bool = False) -> list[str]:
    """Rename what looks like a checkpoint newer than the newest complete one, but is damaged; the old names.

    Where a machine keeps `parts`, those that its ranks wrote, files that are not there are no damage.
    """
    moved = []
    for folder in passed_over(checkpoints, newest):
        if not (parts and is_complete(folder, parts=True)):
            folder.rename(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
            moved.append(folder.name)
    return moved


def is_complete(folder: Path, *, parts: bool = False) -> bool:
    """Whether the manifest is there and each file it names, or with `parts` those that are there, is as it says."""
    try:
        files = read_manifest((folder / MANIFEST).read_bytes())
        here = {name: entry for name, entry in files.items() if not parts or (folder / name).exists()}
        return all(is_whole(folder / name, entry) for name, entry in here.items())
    except (OSError, ValueError):
        return False


def prune_checkpoints(
    checkpoints: Path,
    keep: int,  # complete ones to keep, the newest; 0 keeps all
    every: int = 0,  # also keep those after a number of rounds that this divides; 0: none
    *,
    spare: Path | None = None,  # one that stays whatever else there is
) -> list[str]:
    """Remove what is incomplete and, newest first, what is beyond `keep`; the names of the latter."""
    complete = [spare] if spare else []
    for folder in newest_first(checkpoints):
        if folder == spare:
            continue
        if (folder / MANIFEST).is_file():
            complete.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    gone = [folder for folder in complete[keep:] if not _lasting(folder, every)] if keep else []
    for folder in gone:
        (folder / MANIFEST).unlink()  # first: a half-removed checkpoint must not count
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in gone]


def _lasting(folder: Path, every: int) -> bool:
    try:
        return lasts((folder / "trainer.json").read_bytes(), every)
    except OSError:
        return False


def lasts(trainer: bytes, every: int) -> bool:
    """Whether a checkpoint with this trainer.json is one of those to keep for good."""
    try:
        said = json.loads(trainer)
        return bool(every) and said["round"] % every == 0 and not said.get("done", 0)
    except (ValueError, KeyError, TypeError):
        return False


def newest_first(checkpoints: Path) -> list[Path]:
    """Folders named as `write_checkpoint` is asked to, by step; a copy that somebody keeps beside them is not ours."""
    ours = [path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(ours, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


class Writer:
    """Writes one checkpoint after the other in the background. Every rank has one; its methods are collective."""

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        world: int,
        keep: int,
        every: int,
        remote: str,  # s3://bucket/prefix, or ''
        claim: str = "",  # rank 0's on it, by bucket.take_over
        beat: Callable[[], None] = lambda: None,  # called about once a second while waiting
        left: Callable[[], float] = lambda: math.inf,  # seconds until all has to be done, once a stop was asked for
        patience: float = 3600,  # seconds for which one rank may write or send longer than another
        flush: Callable[[], None] = lambda: None,  # completes what a person looks at, before that is sent
    ) -> None:
        self._run, self._rank, self._world = run, rank, world
        self._keep, self._every, self._remote, self._claim = keep, every, remote, claim
        self._lasting = set[str]()  # in the bucket, as far as is known
        self._mine = list[str]()  # this rank's files of the newest checkpoint
        # A group of its own: the threads of all ranks talk while the main threads train.
        wait = timedelta(seconds=patience)
        self._group: Any = dist.new_group(backend="gloo", timeout=wait) if world > 1 else None
        self._beat, self._flush, self._left = beat, flush, left
        self._thread: threading.Thread | None = None
        self._failed: str = ""
        self._error: BaseException | None = None
        self.seconds = 0.0
        """Of the last checkpoint that is done: from its start to its manifest, in the background."""
        self.uploaded = 0.0
        """Of them, seconds spent on uploading."""
        self.unsent = ""
        """The name of the newest checkpoint, if it is not in the bucket; the same on all ranks."""

    def start(self, name: str, copy: Callable[[], None], files: Mapping[str, Write]) -> None:
        """Begin to write this rank's files of checkpoint `name`, after `copy` from memory that nobody changes.

        Waits for the checkpoint before. Raises InputError where that could not be written.
        """
        self.join()
        folder = self._run / "checkpoints" / name
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if self._world > 1:
            dist.barrier(self._group)
        self._thread = threading.Thread(
            target=self._work, args=(folder, copy, files), name=f"write {name}", daemon=True
        )
        self._thread.start()

    def resend(self, name: str) -> None:
        """Begin to send a checkpoint that is not in the bucket: what the ranks wrote, or what an earlier start left."""
        folder = self._run / "checkpoints" / name
        names = self._mine
        if not names and self._rank == 0:
            names = list(read_manifest((folder / MANIFEST).read_bytes()))
        self._thread = threading.Thread(target=self._resend, args=(folder, names), name=f"send {name}", daemon=True)
        self._thread.start()

    def join(self, *, within: float = math.inf, share: float = 1.0) -> bool:
        """Wait for the checkpoint that is being written; False if it is not there within so many seconds or, once a
        stop was asked for, within this share of the time that is left then.

        Raises InputError on every rank where any could not write its files: what was there before is untouched. Raises
        what a collective does when another rank is gone.
        """
        if self._thread is None:
            return True
        end, asked = time.monotonic() + within, False
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(min(1.0, max(0.0, end - time.monotonic())))
            self._beat()  # waiting for a bucket is no standstill
            if not asked and not math.isinf(left := self._left()):
                end, asked = min(end, time.monotonic() + max(1.0, share * left)), True
        if self._thread.is_alive():
            return False
        self._thread = None
        if self._error:
            raise self._error
        if self._failed:
            raise InputError(self._failed)
        return True

    def _work(self, folder: Path, copy: Callable[[], None], files: Mapping[str, Write]) -> None:
        title("write")
        begun = time.perf_counter()
        try:
            problem = self._write(folder, copy, files)
            if problem:
                self._failed = (
                    f"{folder} could not be written ({problem}): make room or choose another --run.path; the "
                    "checkpoint before it is untouched"
                )
            elif self._remote:
                self._mine = list(files)
                self._resend(folder, self._mine)
        except BaseException as error:  # a rank that is gone, say; nobody else would see it
            self._error = error
        self.seconds = time.perf_counter() - begun

    def _resend(self, folder: Path, names: list[str]) -> None:
        title("upload")
        clock = time.perf_counter()
        try:
            self._failed = self._send(folder, names)
        except BaseException as error:
            self._error = error
        self.uploaded = time.perf_counter() - clock

    def _write(self, folder: Path, copy: Callable[[], None], files: Mapping[str, Write]) -> str:
        """Here, manifest last; what went wrong on any rank, the same on all."""
        entries, problem, mine = Entries(), "", ""
        try:
            copy()  # first: the next step waits for it
            for name, write in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write(folder / name)
                entries[name] = _settle(folder / name)
        except Exception as error:
            mine = f"rank {self._rank}: {type(error).__name__}: {error}"
        told = self._gather((entries, mine))
        problem = next((text for _, text in told if text), "")
        if self._rank == 0 and not problem:
            try:
                write_manifest(folder, {name: entry for part, _ in told for name, entry in part.items()})
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        if self._rank == 0 and problem:
            shutil.rmtree(folder, ignore_errors=True)
        elif self._rank == 0:
            self._may_fail(
                lambda: prune_checkpoints(folder.parent, self._keep, self._every, spare=folder),
                f"old checkpoints stay in {folder.parent}",
            )
        names = {path.name for path in newest_first(folder.parent)} if self._rank == 0 else set[str]()
        said: tuple[str, set[str]] = self._gather((problem, names))[0]
        problem, names = said
        if not problem and os.environ.get("LOCAL_RANK") == "0":  # a machine with a folder of its own holds parts
            for path in newest_first(folder.parent):
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)
        return problem

    def _send(self, folder: Path, names: list[str]) -> str:
        """To the bucket, each rank its files, manifest last; where that fails, the checkpoint stays local.

        What ends the run on all ranks, if anything: another one has the bucket now.
        """
        lost, taken = "", ""
        if self._rank == 0:
            try:
                bucket.check_claim(self._remote, self._claim)
            except Conflict as error:
                taken = f"{error}; what this one has is in {folder}"
            except Exception as error:
                lost = str(error) or type(error).__name__
        said: tuple[str, str] = self._gather((lost, taken))[0]
        lost, taken = said
        if not lost and not taken:
            lost = next(filter(None, self._gather(self._try(lambda: bucket.upload(folder, self._remote, names)))), "")
        if self._rank == 0 and not lost and not taken:
            try:
                self._finish_remote(folder)
            except Conflict as error:
                taken = f"{error}; what this one has is in {folder}"
            except Exception as error:
                lost = str(error) or type(error).__name__
        said = self._gather((lost, taken))[0]  # nobody is done before all are
        lost, taken = said
        self.unsent = folder.name if lost else ""
        if lost and self._rank == 0:
            log.warning("%s stays local: %s: %s", folder, self._remote, lost)
        return taken

    def _finish_remote(self, folder: Path) -> None:
        self._flush()
        bucket.mirror(self._run, self._remote, bucket.RECORDS)
        bucket.check_claim(self._remote, self._claim)  # sending may have taken long
        bucket.upload(folder, self._remote, [MANIFEST])
        self._may_fail(
            lambda: bucket.mirror(self._run, self._remote, bucket.PICTURES),
            f"pictures and TensorBoard's files in {self._remote} are old",
        )
        self._may_fail(
            lambda: bucket.prune(
                self._remote, folder.name, self._keep, lambda text: lasts(text, self._every), self._lasting
            ),
            f"old checkpoints stay in {self._remote}",
        )

    @staticmethod
    def _may_fail(act: Callable[[], object], else_: str) -> None:
        """What does no harm to the new checkpoint."""
        try:
            act()
        except (OSError, InputError, Unavailable) as error:
            log.warning("%s: %s", else_, error)

    def _gather(self, mine: Any) -> list[Any]:
        """Collective, among the threads: what each rank says."""
        told: list[Any] = [mine]
        if self._world > 1:
            told = [None] * self._world
            dist.all_gather_object(told, mine, group=self._group)
        return told

    @staticmethod
    def _try(act: Callable[[], None]) -> str:
        """What went wrong with a bucket: training goes on without it."""
        try:
            act()
            return ""
        except Exception as error:
            return str(error) or type(error).__name__


def _settle(file: Path) -> dict[str, Any]:
    """Make a file survive a power cut, and as readable as others (safetensors writes 0600); its manifest entry."""
    file.chmod(0o666 & ~UMASK)
    sync_file(file)
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}
