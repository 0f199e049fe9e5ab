"""Checkpoints: a folder of files and a manifest written last. Without the manifest there is no checkpoint.

step-00001234/
  model.safetensors       float32 weights, independent of how they were trained
  ema.safetensors         their moving average, if one is kept
  trainer.json            images seen, round, step, world size
  state/rank-00000-of-00002.safetensors  what a rank wrote of all that is needed to go on bit for bit
  manifest.json           size and sha256 of each file above

They are written in the background from copies in memory, by each rank its own files, also to a bucket if there is one.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.errors import InputError, Unavailable
from pipeline.runtime import remote
from pipeline.runtime.titles import title

log = logging.getLogger("naign.checkpoint")

MANIFEST = "manifest.json"

Write = Callable[[Path], None]
"""Writes one file."""

Entries = dict[str, dict[str, Any]]
"""Of a manifest: bytes and sha256 by name."""


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


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file it names has its size and hash."""
    try:
        files: Entries = json.loads((folder / MANIFEST).read_text())["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == entry["bytes"] and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prune_checkpoints(
    checkpoints: Path,
    keep: int,  # complete ones to keep, the newest; 0 keeps all
    every: int = 0,  # also keep those after a number of rounds that this divides; 0: none
) -> list[str]:
    """Remove what is incomplete and, newest first, what is beyond `keep`; the names of the latter."""
    complete = []
    for folder in newest_first(checkpoints):
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
        trainer = json.loads((folder / "trainer.json").read_text())
        return bool(every) and trainer["round"] % every == 0 and not trainer.get("done", 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_atomically(file: Path, text: str) -> None:
    """Replace a file by `text` so that a reader or a kill sees the old one or the new one, whole."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    _sync(partial)
    os.replace(partial, file)


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
    ) -> None:
        self._run, self._rank, self._world = run, rank, world
        self._keep, self._every, self._remote = keep, every, remote
        # A group of its own: the threads of all ranks talk while the main threads train.
        self._group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self._thread: threading.Thread | None = None
        self._failed: str = ""
        self.seconds = 0.0
        """Of the last checkpoint that is done: from its start to its manifest, in the background."""
        self.uploaded = 0.0
        """Of them, seconds spent on uploading."""

    def start(self, name: str, files: Mapping[str, Write]) -> None:
        """Begin to write this rank's files of checkpoint `name`, from memory that nobody changes any more.

        Waits for the checkpoint before. Raises InputError where that could not be written.
        """
        self.join()
        folder = self._run / "checkpoints" / name
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if self._world > 1:
            dist.barrier(self._group)
        self._thread = threading.Thread(target=self._work, args=(folder, files), name=f"write {name}", daemon=True)
        self._thread.start()

    def join(self, within: float | None = None) -> bool:
        """Wait for the checkpoint that is being written; False if it is not there within so many seconds.

        Raises InputError on every rank where any could not write its files: what was there before is untouched.
        """
        if self._thread is None:
            return True
        self._thread.join(within)
        if self._thread.is_alive():
            return False
        self._thread = None
        if self._failed:
            raise InputError(self._failed)
        return True

    def _work(self, folder: Path, files: Mapping[str, Write]) -> None:
        title("write")
        begun = time.perf_counter()
        entries, problem, lost, uploading = Entries(), "", "", 0.0
        try:
            for name, write in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write(folder / name)
                entries[name] = _settle(folder / name)
        except Exception as error:
            problem = f"rank {self._rank}: {type(error).__name__}: {error}"
        if self._remote and not problem:
            title("upload")
            clock = time.perf_counter()
            lost = self._try(lambda: remote.upload(folder, self._remote, list(entries)))
            uploading = time.perf_counter() - clock
        told: list[Any] = [(entries, problem, lost)]
        if self._world > 1:
            told = [None] * self._world
            dist.all_gather_object(told, (entries, problem, lost), group=self._group)
        problems = [text for _, text, _ in told if text]
        losses = [text for _, _, text in told if text]
        if self._rank == 0 and not problems:
            try:
                write_manifest(folder, {name: entry for part, _, _ in told for name, entry in part.items()})
                gone = prune_checkpoints(folder.parent, self._keep, self._every)
                if self._remote and not losses:
                    clock = time.perf_counter()
                    losses = list(filter(None, [self._try(lambda: self._finish_remote(folder, gone))]))
                    uploading += time.perf_counter() - clock
            except OSError as error:
                problems = [f"{type(error).__name__}: {error}"]
        if losses:
            log.warning("%s stays local: %s: %s", folder, self._remote, losses[0])
        if problems:
            shutil.rmtree(folder, ignore_errors=True)
            self._failed = (
                f"{folder} could not be written ({problems[0]}): make room or choose another --run.path; the "
                f"checkpoint before it is untouched"
            )
        self.seconds, self.uploaded = time.perf_counter() - begun, uploading

    def _finish_remote(self, folder: Path, gone: list[str]) -> None:
        remote.mirror(self._run, self._remote)
        remote.upload(folder, self._remote, [MANIFEST])
        remote.prune(self._remote, gone, MANIFEST)

    @staticmethod
    def _try(act: Callable[[], None]) -> str:
        """What went wrong with a bucket: training goes on without it."""
        try:
            act()
            return ""
        except (InputError, Unavailable, OSError) as error:
            return str(error)


def _settle(file: Path) -> dict[str, Any]:
    """Make a file survive a power cut; its entry in the manifest."""
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
