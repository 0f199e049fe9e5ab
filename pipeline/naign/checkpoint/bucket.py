"""The copy of a run in a bucket: checkpoints, each with its manifest written last, and the files of its reports."""

import fnmatch
import json
import logging
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from naign.checkpoint.manifest import MANIFEST, by_step, is_whole, read_manifest, read_object
from naign.errors import Conflict, Damaged, InputError, printable
from naign.storage.base import Store
from naign.storage.local import sync_file, write_atomically
from naign.storage.store import locate, open_store

RECORDS = ("config.yaml", "metrics.jsonl")
PICTURES = ("tensorboard/*", "samples/*", "trackers/*")
"""Patterns of the files copied besides a checkpoint: RECORDS before its manifest, PICTURES after it."""
OWNER = "owner.json"  # names the only process that may write to the bucket: the one that started last

log = logging.getLogger("naign.bucket")


def upload(folder: Path, remote: str, names: list[str]) -> None:
    """Copy `names` of a checkpoint's folder (.../checkpoints/step-00001234). Raises InputError or Unavailable."""
    for name in names:
        send_file(folder / name, f"{remote}/checkpoints/{folder.name}/{name}")


def send_file(file: Path, url: str) -> None:
    store, name = locate(url)
    store.put_file(name, file)


def newest_first(remote: str) -> Iterator[str]:
    """The names of the checkpoints that have a manifest, newest first."""
    for name in by_step(open_store(f"{remote}/checkpoints").folders()):
        if open_store(f"{remote}/checkpoints/{name}").exists(MANIFEST):
            yield name


def download(remote: str, name: str, checkpoints: Path) -> Path:
    """Download a checkpoint, its manifest last; intact local files are kept. Returns its folder. Raises Damaged if a
    file does not match the manifest, or the manifest names a file outside the folder.
    """
    where = f"{remote}/checkpoints/{name}"
    folder = checkpoints / name
    text = open_store(where).read(MANIFEST)
    with _damage_named(where):
        files = read_manifest(text)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for file, entry in files.items():
            if not is_whole(folder / file, entry):  # else left by an interrupted download
                _download_file(where, file, entry, folder)
    (folder / MANIFEST).write_bytes(text)
    return folder


def fetch_file(
    remote: str,
    name: str,
    files: Iterable[str],
    folder: Path,
) -> Path:
    """Download the first of `files` that a checkpoint has. Raises Damaged if it has none, or other bytes."""
    where = f"{remote}/checkpoints/{name}"
    with _damage_named(where):
        entries = read_manifest(open_store(where).read(MANIFEST))
        for file in files:
            if file in entries:
                _download_file(where, file, entries[file], folder)
                return folder / file
        raise ValueError("its manifest names no weights")


@contextmanager
def _damage_named(where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise Damaged(f"{where} is damaged ({error}): remove it") from None


def _download_file(
    where: str,
    file: str,
    entry: dict[str, Any],
    folder: Path,
) -> None:
    """Raises ValueError if the file does not match its entry in the manifest."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    store, base = locate(f"{where}/{file}")
    if store.size(base) != entry["bytes"]:  # before it fills the disk
        raise ValueError(f"{file} has another size")
    with closing(store.pieces(base)) as pieces, (folder / file).open("wb") as target:
        target.writelines(pieces)
    sync_file(folder / file)
    if not is_whole(folder / file, entry):
        raise ValueError(f"{file} has another hash")


def fetch_shown(remote: str, run: Path) -> int:
    """Download records, TensorBoard's files and pictures that are missing here or differ. Returns their number."""
    remote = remote.rstrip("/")
    fetched = 0
    for pattern in (*RECORDS, *PICTURES):
        store, wanted = locate(f"{remote}/{pattern}")
        for name in fnmatch.filter(store.list(), wanted):
            is_plain = Path(name).name == name and name not in (".", "..") and name.isprintable()
            if not is_plain:  # a server may answer anything
                raise InputError(f"{store.url(name)!r} is not a name that a file of a run can have: remove that object")
            file = (run / pattern).with_name(name)
            if not file.exists() or not _is_same(file, store):
                write_atomically(file, store.read(name), sync=False)
                fetched += 1
    return fetched


def mirror(run: Path, remote: str, patterns: Sequence[str]) -> None:
    """Upload the files that match the patterns and differ from those in the bucket."""
    for pattern in patterns:
        store, _ = locate(f"{remote}/{pattern}")
        for file in sorted(run.glob(pattern)):
            if not _is_same(file, store):
                send_file(file, store.url(file.name))


def _is_same(file: Path, store: Store) -> bool:
    """Whether an object equals the file: by content where that is replaced, by size where the file only grows."""
    try:
        if file.name == "config.yaml" or file.parent.name == "trackers":
            return store.read(file.name) == file.read_bytes()
        return store.size(file.name) == file.stat().st_size
    except InputError:
        return False


def take_over(remote: str) -> str:
    """Become the only process that may write to the bucket, and log who was. Returns the claim for `check_claim`."""
    before = _owner(remote)
    if before:
        log.info("%s: the earlier start of this run on %s can no longer upload", remote, before["host"])
    owner = {"claim": uuid.uuid4().hex, "host": socket.gethostname()}
    open_store(remote).put(OWNER, json.dumps(owner).encode())
    return owner["claim"]


def check_claim(remote: str, claim: str) -> None:
    """Raise Conflict if another process has called `take_over` since."""
    owner = _owner(remote)
    if owner and owner["claim"] != claim:
        raise Conflict(
            f"{remote} was taken over by a run that started later (on {owner['host']}): this one exits and writes no "
            "more to it; give each run its own --run.remote"
        )


def _owner(remote: str) -> dict[str, str]:
    """The claim and host of the process that may write to the bucket; {} if the file is missing or unreadable."""
    found = read_object(remote, OWNER)
    if "claim" not in found or "host" not in found:
        return {}
    return {"claim": str(found["claim"]), "host": printable(str(found["host"]))}
