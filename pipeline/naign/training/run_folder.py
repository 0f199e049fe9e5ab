"""The folder of a run and its copy in a bucket: who may use it, and which checkpoint it resumes from.

`claim` takes the folder on rank 0 and finds the checkpoint (`find_newest`); `find_claimed` finds it on other ranks.
"""

import contextlib
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from naign.checkpoint import bucket
from naign.checkpoint.manifest import MANIFEST, read_object, step_of
from naign.checkpoint.writer import is_complete, newest_checkpoint, passed_over
from naign.config import Config, changeable, count_rounds, differences, from_dict
from naign.errors import Damaged, InputError, unwritten
from naign.model.naign import NAIGN
from naign.settings.constraints import MAY_CHANGE
from naign.storage.local import write_atomically
from naign.storage.store import open_store, was_there

log = logging.getLogger("naign.run")

# Seconds to wait for the lock of a run's folder. A listing of runs may hold it for an instant; a network file system
# keeps a dead host's for a while, and Slurm starts the job again at once.
LOCK_SECONDS = 5.0
LOCK_SECONDS_AGAIN = 120.0

# What reading a checkpoint raises if a file is missing, or is not what this program writes.
DAMAGE = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    SafetensorError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    RecursionError,
)


def claim(config: Config) -> tuple[Path | None, str, FileLock]:
    """Take the run's folder, on rank 0: the checkpoint to resume from, a token for `find_claimed`, and a lock to hold.

    Raises InputError, changing nothing, if the folder is in use or another configuration's, and `unwritten`.
    """
    folder = Path(config.run.path)
    seconds = LOCK_SECONDS_AGAIN if "SLURM_RESTART_COUNT" in os.environ else LOCK_SECONDS
    lock = FileLock(folder / ".lock", timeout=seconds)
    try:
        make_folder(folder)
        lock.acquire()
        checkpoints = folder / "checkpoints"
        if checkpoints.exists() and not checkpoints.is_dir():
            raise NotADirectoryError(f"{checkpoints} is not a folder")
        newest = find_newest(config)
        token = uuid.uuid4().hex
        write_atomically(folder / ".claim", token)
    except Timeout:
        raise InputError(f"'{folder}' is in use by another process: wait, or choose another --run.path") from None
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError):
            raise unwritten(f"run.path '{folder}' cannot be written: {error}") from None
        raise
    return newest, token, lock


def make_folder(folder: Path) -> None:
    """Make the run's folder. InputError for a name that no file system takes, with NUL or a lone surrogate."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise InputError(f"run.path {str(folder)!r} cannot be written: {error}") from None


def find_newest(config: Config) -> Path | None:
    """The newest complete checkpoint of the folder or the bucket; the latter is downloaded with the run's reports.

    Raises InputError, changing nothing, if the folder or the bucket holds another configuration's run.
    """
    checkpoints = Path(config.run.path) / "checkpoints"
    remote = config.run.remote
    sent = list(bucket.newest_first(remote)) if remote else []
    if sent:
        recorded = recorded_at(remote)
        if recorded:
            compare(recorded, config, remote, "--run.remote")
    newest = newest_checkpoint(checkpoints)
    if newest:
        _compare_checkpoint(newest, config)
    damaged = []
    for checkpoint in passed_over(checkpoints, newest):
        if checkpoint.name in sent:
            log.warning("%s lacks files of other hosts, or is damaged: the copy in the bucket is used", checkpoint)
        else:
            log.warning("%s is damaged or incomplete: passed over", checkpoint)
        if not remote:  # beside a bucket, it may be this machine's part alone
            damaged.append(str(checkpoint))
    for name in sent:
        if newest and step_of(name) <= step_of(newest.name):
            return newest
        try:
            # What the run reported comes first: once a checkpoint is here, all before it counts as being here.
            bucket.fetch_shown(remote, checkpoints.parent)
            downloaded = bucket.download(remote, name, checkpoints)
            _compare_checkpoint(downloaded, config)
            return downloaded
        except Damaged:
            shutil.rmtree(checkpoints / name, ignore_errors=True)
            damaged.append(f"{remote}/checkpoints/{name}")
            log.warning("%s is damaged: passed over", damaged[-1])
    unfinished = sorted(checkpoints.glob("step-*"))
    if unfinished and not damaged and newest is None:
        log.warning("%s has no manifest, so it is incomplete: passed over", unfinished[-1])
    if damaged and newest is None:
        raise InputError(f"{damaged[0]} and all before it are damaged: mend one, or remove them to start anew")
    return newest


def find_claimed(config: Config, name: str, token: str) -> Path | None:
    """The checkpoint of that name ("": none) on this rank: in the folder that rank 0 has claimed with `token`, or from
    the bucket where this rank does not see that folder.

    Raises InputError if there is no bucket then, or if its own folder holds another configuration's run.
    """
    run = Path(config.run.path)
    remote = config.run.remote
    checkpoint = run / "checkpoints" / name
    claimed = run / ".claim"
    if claimed.exists() and claimed.read_text() == token:
        return checkpoint if name else None
    if not remote:
        other = f"run.path '{run}' is not the same folder on every machine"
        raise InputError(f"{other}: put it on a shared file system, or set --run.remote=s3://bucket/prefix")
    recorded = recorded_at(str(run.absolute()))
    if recorded and list(run.glob("checkpoints/step-*")):
        compare(recorded, config, f"'{run}' on {socket.gethostname()}", "--run.path")
    if not name:
        return None
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(checkpoint.parent / ".download"):  # the ranks of a machine come one by one: the first one fetches
        if not is_complete(checkpoint):
            with was_there(f"{remote}/checkpoints/{name}/{MANIFEST}"):  # when rank 0 asked
                bucket.download(remote, name, checkpoint.parent)
    return checkpoint


def is_done(config: Config, place: str) -> bool:
    """Whether `place`, a bucket or folder of this run, has its last checkpoint in full."""
    recorded = recorded_at(place)
    if not recorded or differences(recorded, config):
        return False
    newest = next(bucket.newest_first(place), None)
    if newest is None:
        return False
    state = read_object(f"{place}/checkpoints/{newest}", "trainer.json")
    return bool(state.get("round", 0) >= count_rounds(config) and state.get("fitted", 0) >= 1)


def recorded_at(place: str) -> Config | None:
    """The configuration that the run in a folder or bucket has recorded in config.yaml, if that is there."""
    store = open_store(place)
    where = store.url("config.yaml")
    if not store.exists("config.yaml"):
        return None
    try:
        content = yaml.safe_load(store.read("config.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where} is not a configuration ({type(error).__name__}): remove it") from None
    return from_dict(content, where=where)


def compare(recorded: Config, config: Config, place: str, option: str) -> list[str]:
    """Settings in which a run at `place` differs from this one, where that is allowed; InputError where it is not."""
    changed = differences(recorded, config)
    allowed = all(line.partition(":")[0] in changeable(config, MAY_CHANGE) for line in changed)
    if changed and (config.resume != "changed" or not allowed):
        lines = "\n  ".join([f"{place} holds a run of another configuration:", *changed])
        remedy = f"choose another {option}, or take these settings back to go on with that run"
        if allowed:
            remedy += ", or go on with what is changed by --resume=changed"
        raise InputError(f"{lines}\n{remedy}")
    return changed


def _compare_checkpoint(checkpoint: Path, config: Config) -> None:
    """Compare with the configuration in the checkpoint, rather than with config.yaml, which anyone may edit."""
    metadata = read_model(checkpoint).metadata
    recorded = from_dict(metadata.get("config"), where=str(checkpoint))
    for line in compare(recorded, config, f"'{config.run.path}'", "--run.path"):
        log.warning("goes on with another %s", line)


def read_model(checkpoint: Path, name: str = "model.safetensors") -> NAIGN:
    """A model file of a checkpoint, on the CPU. Raises InputError as `damage_named` does, and where the model cannot be
    built, as of another package that is not installed.
    """
    with damage_named(checkpoint):
        open_tensors(checkpoint / name)  # from_pretrained calls a failing disk a damaged file
    return NAIGN.from_pretrained(checkpoint / name)


@contextlib.contextmanager
def damage_named(checkpoint: Path) -> Iterator[None]:
    """InputError, naming the checkpoint, for damaged or foreign files; what a retry may help passes unchanged."""
    try:
        yield
    except DAMAGE as error:
        problem = f"{checkpoint} cannot be resumed from ({type(error).__name__}: {error})"
        raise InputError(f"{problem}: remove that folder to go on from the checkpoint before it") from None


def open_tensors(file: Path) -> Any:
    """An open safetensors file, on the CPU."""
    file.open("rb").close()  # safetensors would call any failure to open it a missing file
    return safe_open(file, framework="pt", device="cpu")
