"""Checkpoints: a folder of files and a manifest written last. Without the manifest there is no checkpoint.

step-00001234/
  model.safetensors   float32 weights, independent of how they were trained
  ema.safetensors     their moving average, if one is kept
  trainer.json        images seen, round, step, world size
  state/optimizer.pt  what the optimizer needs to go on bit for bit (read with weights_only)
  manifest.json       size and sha256 of each file above
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_checkpoint(
    folder: Path,  # .../checkpoints/step-00001234
    fill: Callable[[Path], None],  # writes the files into the folder it is given
) -> None:
    """Write a checkpoint so that a kill at any moment leaves either all of it or none that counts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fill(folder)
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(file)
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint below `checkpoints`, or None."""
    return next((folder for folder in _newest_first(checkpoints) if is_complete(folder)), None)


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file it names has its size and hash."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == entry["bytes"] and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prune_checkpoints(
    checkpoints: Path,
    keep: int,  # complete ones to keep, the newest; 0 keeps all
) -> None:
    """Remove what is incomplete and, newest first, what is beyond `keep`."""
    complete = []
    for folder in _newest_first(checkpoints):
        if (folder / MANIFEST).is_file():
            complete.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in complete[keep:] if keep else []:
        (folder / MANIFEST).unlink()  # first: a half-removed checkpoint must not count
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(file: Path, text: str) -> None:
    """Replace a file by `text` so that a reader or a kill sees the old one or the new one, whole."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    _sync(partial)
    os.replace(partial, file)


def _newest_first(checkpoints: Path) -> list[Path]:
    """Folders named as `write_checkpoint` is asked to, by step; a copy that somebody keeps beside them is not ours."""
    ours = [path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(ours, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
