"""The copy of a run in a bucket: checkpoints, each with its manifest written last, and the files of its reports."""

import contextlib
import fnmatch
import json
import logging
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from naign.checkpoint.manifest import BEST, MANIFEST, best_named, by_step, is_whole, read_manifest, read_object
from naign.errors import Conflict, Damaged, InputError
from naign.storage.base import Store
from naign.storage.local import sync_file, write_atomically
from naign.storage.store import locate, open_store

RECORDS = ("config.yaml", "metrics.jsonl")
PICTURES = ("tensorboard/*", "samples/*", "trackers/*")
"""Patterns of the files copied besides a checkpoint: RECORDS before its manifest; BEST and PICTURES after it."""
CHANGING = ("config.yaml", BEST)

log = logging.getLogger("naign.bucket")

OWNER = "owner.json"  # names the only process that may write to the bucket: the one that started last


def upload(folder: Path, remote: str, names: list[str]) -> None:
    """Copy `names` of a checkpoint's folder (.../checkpoints/step-00001234). Raises InputError or Unavailable."""
    for name in names:
        _copy(folder / name, f"{remote}/checkpoints/{folder.name}/{name}")


def newest_first(remote: str) -> Iterator[str]:
    """The names of the checkpoints that have a manifest, newest first."""
    for name in by_step(open_store(f"{remote}/checkpoints").folders()):
        if open_store(f"{remote}/checkpoints/{name}").exists(MANIFEST):
            yield name


def read_trainer(remote: str, name: str) -> dict[str, Any]:
    """The content of a checkpoint's trainer.json; {} if a file is missing or of another size."""
    where = f"{remote}/checkpoints/{name}"
    try:
        for file, entry in read_manifest(open_store(where).read(MANIFEST)).items():
            store, base = locate(f"{where}/{file}")
            if not store.exists(base) or store.size(base) != entry["bytes"]:
                return {}
        return dict(json.loads(open_store(where).read("trainer.json")))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}


def download(remote: str, name: str, checkpoints: Path) -> Path:
    """Download a checkpoint, its manifest last; intact local files are kept. Returns its folder. Raises Damaged if a
    file does not match the manifest, or the manifest names a file outside the folder.
    """
    where, folder = f"{remote}/checkpoints/{name}", checkpoints / name
    text = open_store(where).read(MANIFEST)
    try:
        files = read_manifest(text)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for file, entry in files.items():
            if not is_whole(folder / file, entry):  # else left by an interrupted download
                _download_file(where, file, entry, folder)
    except (ValueError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise Damaged(f"{where} is damaged ({error}): remove it") from None
    (folder / MANIFEST).write_bytes(text)
    return folder


def fetch_file(remote: str, name: str, files: Iterable[str], folder: Path) -> Path:
    """Download the first of `files` that a checkpoint has. Raises Damaged if it has none, or other bytes."""
    where = f"{remote}/checkpoints/{name}"
    try:
        entries = read_manifest(open_store(where).read(MANIFEST))
        if not (there := [file for file in files if file in entries]):
            raise ValueError("its manifest names no weights")
        _download_file(where, there[0], entries[there[0]], folder)
    except (ValueError, KeyError) as error:
        raise Damaged(f"{where} is damaged ({error}): remove it") from None
    return folder / there[0]


def _download_file(where: str, file: str, entry: dict[str, Any], folder: Path) -> None:
    """Raises ValueError if the file does not match its entry in the manifest."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    store, base = locate(f"{where}/{file}")
    if store.size(base) != entry["bytes"]:  # before it fills the disk
        raise ValueError(f"{file} has another size")
    with contextlib.closing(store.pieces(base)) as pieces, (folder / file).open("wb") as target:
        target.writelines(pieces)
    sync_file(folder / file)
    if not is_whole(folder / file, entry):
        raise ValueError(f"{file} has another hash")


def fetch_shown(remote: str, run: Path) -> int:
    """Download records, TensorBoard's files and pictures that are missing here or differ. Returns their number."""
    fetched, remote = 0, remote.rstrip("/")
    for pattern in (*RECORDS, BEST, *PICTURES):
        store, wanted = locate(f"{remote}/{pattern}")
        for name in fnmatch.filter(store.list(), wanted):
            if name in (".", "..") or Path(name).name != name or not name.isprintable():  # untrusted
                raise InputError(f"{store.url(name)!r} is no name of a file in a run: remove that object")
            file = (run / pattern).with_name(name)
            if not file.exists() or not _is_same(file, store, name):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, store.read(name), sync=False)
                fetched += 1
    return fetched


def mirror(run: Path, remote: str, patterns: Sequence[str]) -> None:
    """Upload the files that match the patterns and differ from those in the bucket."""
    for pattern in patterns:
        store, _ = locate(f"{remote}/{pattern}")
        uploaded = set(store.list())
        for file in sorted(run.glob(pattern)):
            if file.name not in uploaded or not _is_same(file, store, file.name):
                _copy(file, store.url(file.name))


def send_best(run: Path, remote: str) -> str:
    """Upload best.json if the bucket holds the checkpoint that it names. Returns what the bucket's best.json names."""
    name = best_named(str(run.absolute()))
    if not name or not open_store(f"{remote}/checkpoints/{name}").exists(MANIFEST):
        return best_named(remote)
    mirror(run, remote, [BEST])
    return name


def _is_same(file: Path, store: Store, name: str) -> bool:
    """Whether an object equals the file: by content where that is replaced, by size where the file only grows."""
    with contextlib.suppress(InputError):
        if name in CHANGING or file.parent.name == "trackers":
            return store.read(name) == file.read_bytes()
        return store.size(name) == file.stat().st_size
    return False


def take_over(remote: str) -> str:
    """Become the only process that may write to the bucket, and log who was. Returns the claim for `check_claim`."""
    if before := _owner(remote):
        former = f"the earlier start of this run on {before['host']} at {before['since']}"
        log.info("%s: %s can no longer upload", remote, former)
    claim = uuid.uuid4().hex
    owner = {"claim": claim, "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    open_store(remote).put(OWNER, json.dumps(owner).encode())
    return claim


def check_claim(remote: str, claim: str) -> None:
    """Raise Conflict if another process has called `take_over` since."""
    owner = _owner(remote)
    if owner.get("claim", "") not in ("", claim):
        later = f"{remote} was taken over by a run that started later (on {owner['host']}, {owner['since']})"
        raise Conflict(f"{later}: this one exits and writes no more to it; give each run its own --run.remote")


def _owner(remote: str) -> dict[str, str]:
    """The claim, host and start of the process that may write to the bucket; {} if it is missing or unreadable."""
    owner = {key: re.sub(r"[^\w.:+-]", "?", str(value)) for key, value in read_object(remote, OWNER).items()}
    return {"claim": "", "host": "?", "since": "?"} | owner if owner else {}


def _copy(file: Path, url: str) -> None:
    store, name = locate(url)
    with file.open("rb") as source, store.write(name) as target:
        shutil.copyfileobj(source, target, 1 << 20)
