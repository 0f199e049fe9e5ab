"""The copy of a run in a bucket: checkpoints, manifest last, and what a person looks at."""

import contextlib
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.checkpoint.manifest import MANIFEST, is_whole, read_manifest
from pipeline.errors import Conflict, Damaged, InputError
from pipeline.storage.store import open_store

RECORDS = ("config.yaml", "metrics.jsonl")
PICTURES = ("tensorboard/*", "samples/*")
"""What is copied besides checkpoints, before a manifest and after it."""

OWNER = "owner.json"
"""Who writes to the bucket: the process that started last. One that finds another's name there ends."""


def upload(
    folder: Path,  # .../checkpoints/step-00001234
    remote: str,
    names: list[str],  # of files in it
) -> None:
    """Copy files of a checkpoint. Raises InputError or Unavailable as stores do."""
    for name in names:
        _copy(folder / name, f"{remote}/checkpoints/{folder.name}", name)


def newest_first(remote: str) -> Iterator[str]:
    """The names of the checkpoints that have their manifests."""
    for name in _by_step(remote):
        if open_store(f"{remote}/checkpoints/{name}").exists(MANIFEST):
            yield name


def is_there(remote: str, name: str) -> bool:
    """Whether each file of a checkpoint has the size that its manifest says."""
    where = f"{remote}/checkpoints/{name}"
    try:
        for file, entry in read_manifest(open_store(where).read(MANIFEST)).items():
            path, _, base = f"{where}/{file}".rpartition("/")
            if not (store := open_store(path)).exists(base) or store.size(base) != entry["bytes"]:
                return False
    except ValueError:
        return False
    return True


def round_of(remote: str, name: str) -> int:
    """The round in which a checkpoint was written; -1 if it does not say."""
    try:
        return int(json.loads(open_store(f"{remote}/checkpoints/{name}").read("trainer.json"))["round"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return -1


def download(remote: str, name: str, checkpoints: Path) -> Path:
    """Bring a checkpoint here, its manifest last, but for files that are here; its folder.

    Raises Damaged if it is, or speaks of files outside its folder.
    """
    where, folder = f"{remote}/checkpoints/{name}", checkpoints / name
    text = open_store(where).read(MANIFEST)
    try:
        files = read_manifest(text)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for file, entry in files.items():
            if is_whole(folder / file, entry):
                continue  # of an attempt that was cut short
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            path, _, base = f"{where}/{file}".rpartition("/")
            store = open_store(path)
            if store.size(base) != entry["bytes"]:  # before it fills the disk
                raise ValueError(f"{file} has another size")
            with store.open(base) as source, (folder / file).open("wb") as target:
                while data := source.read(1 << 20):
                    target.write(data)
                target.flush()
                os.fsync(target.fileno())
            if not is_whole(folder / file, entry):
                raise ValueError(f"{file} has another hash")
    except (ValueError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise Damaged(f"{where} is damaged ({error}): remove it") from None
    (folder / MANIFEST).write_bytes(text)
    return folder


def fetch_newest(remote: str, run: Path) -> Path:
    """Bring the newest checkpoint that is whole; its folder. InputError where there is none."""
    remote = remote.rstrip("/")
    for name in newest_first(remote):
        with contextlib.suppress(Damaged):
            return download(remote, name, run / "checkpoints")
    raise InputError(f"{remote} holds no complete checkpoint: has its training got that far?")


def fetch_shown(remote: str, run: Path, *, renew: bool = False) -> int:
    """Bring metrics, TensorBoard's files and pictures, where none are here yet, or also what grew; how many files."""
    brought, remote = 0, remote.rstrip("/")
    for pattern in ("metrics.jsonl", *PICTURES):
        folder = os.path.dirname(pattern)
        store = open_store(f"{remote}/{folder}".rstrip("/"))
        for name in store.list():
            if not (folder or name == pattern):
                continue
            if name in (".", "..") or Path(name).name != name or not name.isprintable():  # a stranger's
                raise InputError(f"{store.url(name)!r} is no name of a file in a run: remove that object")
            file = run / folder / name
            if not file.exists() or (renew and file.stat().st_size != store.size(name)):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{name}.{os.getpid()}")
                try:
                    partial.write_bytes(store.read(name))
                    os.replace(partial, file)
                finally:
                    partial.unlink(missing_ok=True)
                brought += 1
    return brought


def mirror(run: Path, remote: str, patterns: Sequence[str]) -> None:
    """Copy what a person looks at, where it changed in size."""
    for pattern in patterns:
        folder = os.path.dirname(pattern)
        store = open_store(f"{remote}/{folder}".rstrip("/"))
        there = set(store.list())
        for file in sorted(run.glob(pattern)):
            same = False
            if file.name in there:
                with contextlib.suppress(InputError):
                    same = store.size(file.name) == file.stat().st_size
            if not same or file.name == "config.yaml":
                _copy(file, f"{remote}/{folder}".rstrip("/"), file.name)


def prune(
    remote: str,
    newest: str,  # name of the checkpoint just sent, which stays
    keep: int,  # complete ones to keep, the newest; 0 keeps all
    lasts: Callable[[bytes], bool],  # whether one with this trainer.json is kept for good
    lasting: set[str],  # names of those known to be; added to
) -> None:
    """Remove checkpoints before `newest` that are beyond `keep` or were never finished, each manifest first."""
    older = [name for name in _by_step(remote) if _step(name) < _step(newest) and name not in lasting]
    complete = 1
    for name in older:
        root = f"{remote}/checkpoints/{name}"
        store = open_store(root)
        if store.exists(MANIFEST):
            complete += 1
            if not keep or complete <= keep:
                continue
            with contextlib.suppress(InputError):  # it has none: then it is not one to keep
                if lasts(store.read("trainer.json")):
                    lasting.add(name)
                    continue
            store.delete(MANIFEST)
        for folder in (root, *(f"{root}/{sub}" for sub in store.folders())):
            store = open_store(folder)
            for file in store.list():
                store.delete(file)


def take_over(remote: str) -> str:
    """Make the bucket's copy this process' own, whoever wrote it before; what `check_claim` wants to hear."""
    claim = uuid.uuid4().hex
    said = {"claim": claim, "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    open_store(remote).put(OWNER, json.dumps(said).encode())
    return claim


def check_claim(remote: str, claim: str) -> None:
    """Raise Conflict if somebody has called `take_over` since."""
    store = open_store(remote)
    if not store.exists(OWNER):
        return
    try:
        said = {key: re.sub(r"[^\w.:+-]", "?", str(value)) for key, value in json.loads(store.read(OWNER)).items()}
        said = {"host": "?", "since": "?"} | said
        if not said.get("claim"):
            raise ValueError("no claim")
    except (ValueError, AttributeError, RecursionError):  # nobody's who could be meant
        return
    if said["claim"] != claim:
        raise Conflict(
            f"{remote} was taken over by a run that started later (on {said['host']}, {said['since']}): this one "
            "writes no more to it and ends; give each run its own --run.remote"
        )


def _copy(file: Path, folder: str, name: str) -> None:
    """A file to folder/name, streamed; `name` may have folders of its own."""
    path, _, base = f"{folder}/{name}".rpartition("/")
    with file.open("rb") as source, open_store(path).write(base) as target:
        while data := source.read(1 << 20):
            target.write(data)


def _by_step(remote: str) -> list[str]:
    """The folders of checkpoints, whole or not, newest first."""
    names = [name for name in open_store(f"{remote}/checkpoints").folders() if name.startswith("step-")]
    return sorted((name for name in names if name.removeprefix("step-").isdecimal()), key=_step, reverse=True)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
