"""What a local folder and a bucket share: names of checkpoints, manifests, and which checkpoints are kept."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from naign.storage.local import LocalStore
from naign.storage.store import open_store

MANIFEST = "manifest.json"


def by_step(names: Iterable[str]) -> list[str]:
    """The names of checkpoints (step-00001234) among `names`, newest first. Others, such as a copy, are ignored."""
    checkpoints = [name for name in names if re.fullmatch(r"step-\d+", name)]
    return sorted(checkpoints, key=step_of, reverse=True)


def step_of(name: str) -> int:
    """1234 of step-00001234."""
    return int(name.removeprefix("step-"))


def prune(root: str, keep: int, *, newest: str = "") -> None:
    """Remove checkpoints in a folder or bucket, manifests first, that are incomplete or not among the newest `keep`
    (0: all). `newest`, just written, is kept and counted, later ones are left alone.
    """
    complete = 1 if newest else 0
    for name in by_step(open_store(root).folders()):
        if newest and step_of(name) >= step_of(newest):
            continue
        if open_store(f"{root}/{name}").exists(MANIFEST):
            complete += 1
            if not keep or complete <= keep:
                continue
        remove(f"{root}/{name}")


def remove(checkpoint: str) -> None:
    """Remove a checkpoint, its manifest first."""
    store = open_store(checkpoint)
    store.delete(MANIFEST)
    if isinstance(store, LocalStore):
        shutil.rmtree(checkpoint, ignore_errors=True)
        return
    names = store.names()
    for file in names.files:
        store.delete(file)
    for folder in names.folders:
        below = open_store(f"{checkpoint}/{folder}")
        for file in below.list():
            below.delete(file)


def read_object(root: str, name: str) -> dict[str, Any]:
    """The JSON object in a file of a run's folder or bucket; {} if it is missing or damaged."""
    store = open_store(root)
    if not store.exists(name):
        return {}
    text = store.read(name)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_whole(file: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is a regular one with the size and hash of its manifest entry."""
    if not file.is_file() or file.is_symlink():
        return False
    if file.stat().st_size != entry["bytes"]:
        return False
    return sha256(file) == str(entry["sha256"])


def read_manifest(text: bytes) -> dict[str, dict[str, Any]]:
    """The entries of a manifest, {"bytes": int, "sha256": str} by file. Raises ValueError if it is malformed or names a
    file outside its folder.
    """
    try:
        files = dict(json.loads(text)["files"])
        for name, entry in files.items():
            path = Path(name)
            leads_out = not path.parts or ".." in path.parts or path.is_absolute()
            if leads_out or name == MANIFEST or "\0" in name:
                raise ValueError(f"a file named {name!r}")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"no size and hash of {name!r}")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not files:
        raise ValueError("no files")
    return files


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
