"""The folder of a run and its copy in a bucket: who may use it, and which checkpoint it resumes from."""

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
from naign.checkpoint.manifest import MANIFEST, step_of
from naign.checkpoint.writer import is_complete, newest_checkpoint, passed_over
from naign.config import Config, changeable, differences, flatten, from_dict
from naign.errors import Damaged, InputError
from naign.model.naign import NAIGN
from naign.settings import budget
from naign.settings.constraints import MAY_CHANGE
from naign.storage.local import TRANSIENT, write_atomically
from naign.storage.store import open_store, was_there

log = logging.getLogger("naign.run")
LOCK_SECONDS = 120.0

DAMAGE = (  # what reading a checkpoint raises if a file is missing, or is not what this program writes
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, SafetensorError, ValueError, TypeError, LookupError),
    *(AttributeError, EOFError, OverflowError, RecursionError),
)


def claim(config: Config) -> tuple[Path | None, str, FileLock]:
    """Take the run's folder, on rank 0: the checkpoint to resume from, a token for `find_claimed`, and a lock to hold.

    Raises InputError, changing nothing, if the folder is in use or another configuration's.
    """
    folder = Path(config.run.path)
    # A network file system keeps a dead host's lock for a while, and Slurm starts the job again at once.
    lock = FileLock(folder / ".lock", timeout=LOCK_SECONDS if "SLURM_RESTART_COUNT" in os.environ else 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            _refuse_never(config, f"'{folder}'", "choose another --run.path, or delete that folder")
        newest, token = find_newest(config), uuid.uuid4().hex
        write_atomically(folder / ".claim", token)
        return newest, token, lock
    except Timeout:
        raise InputError(f"'{folder}' is in use by another process: wait, or choose another --run.path") from None
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError) and error.errno not in TRANSIENT:
            raise InputError(f"run.path '{folder}' cannot be written: {error}") from None
        raise


def compare(recorded: Config, config: Config, place: str, option: str) -> list[str]:
    """Settings in which a run at `place` differs from this one, where that is allowed; InputError where it is not."""
    changed = differences(recorded, config)
    allowed = all(line.partition(":")[0] in changeable(config, MAY_CHANGE) for line in changed)
    if changed and (config.resume != "changed" or not allowed):
        lines = "\n  ".join([f"{place} holds a run of another configuration:", *changed])
        remedy = f"choose another {option}, or take these settings back to go on with that run"
        asked = ", or go on with what is changed by --resume=changed" if allowed else ""
        raise InputError(f"{lines}\n{remedy}{asked}")
    return changed


def recorded_at(place: str) -> Config | None:
    """The configuration that the run in a folder or bucket has recorded in config.yaml, if that is there."""
    store = open_store(place)
    where = store.url("config.yaml")
    if not store.exists("config.yaml"):
        return None
    try:
        content = yaml.safe_load(store.read("config.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where} is no configuration ({type(error).__name__}): remove it") from None
    return from_dict(content, where=where)


def _compare_checkpoint(checkpoint: Path, config: Config) -> None:
    """Compare with the configuration in the checkpoint, rather than with config.yaml, which anyone may edit."""
    recorded = from_dict(read_model(checkpoint, "model.safetensors").metadata.get("config"), where=str(checkpoint))
    for line in compare(recorded, config, f"'{config.run.path}'", "--run.path"):
        log.warning("goes on with another %s", line)


def _refuse_never(config: Config, place: str, remedy: str) -> None:
    """InputError, if resume=never, about a run that is there."""
    if config.resume == "never":
        raise InputError(f"{place} already holds a run and resume=never does not overwrite it: {remedy}")


def read_model(checkpoint: Path, name: str) -> NAIGN:
    """A model file of a checkpoint, on the CPU. Raises InputError as `damage_named` does."""
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


def find_newest(config: Config) -> Path | None:
    """The newest complete checkpoint of the folder or the bucket; the latter is downloaded with the run's reports.

    Raises InputError, changing nothing, if the folder or the bucket holds another configuration's run.
    """
    run, remote = Path(config.run.path), config.run.remote
    folder = run / "checkpoints"
    names = list(bucket.newest_first(remote)) if remote else []
    if names:
        _refuse_never(config, remote, "choose another --run.remote")
        if recorded := recorded_at(remote):
            compare(recorded, config, remote, "--run.remote")
    if newest := newest_checkpoint(folder):
        _compare_checkpoint(newest, config)
    passed = passed_over(folder, newest)
    damaged = str(passed[0]) if passed and not remote else ""  # beside a bucket, it may be this machine's part alone
    for checkpoint in passed:
        sent = "lacks files of other hosts, or is damaged: the copy in the bucket is used"
        log.warning("%s %s", checkpoint, sent if checkpoint.name in names else "is damaged or incomplete: passed over")
    for name in names:
        if newest and step_of(name) <= step_of(newest.name):
            return newest
        with contextlib.suppress(Damaged):
            # First what the run reported: once its checkpoint is here, all of it counts as being here.
            bucket.fetch_shown(remote, run)
            _compare_checkpoint(downloaded := bucket.download(remote, name, folder), config)
            return downloaded
        shutil.rmtree(folder / name, ignore_errors=True)
        damaged = damaged or f"{remote}/checkpoints/{name}"
        log.warning("%s/checkpoints/%s is damaged: passed over", remote, name)
    if damaged and newest is None:
        raise InputError(f"{damaged} and all before it are damaged: mend one, or remove them to start anew")
    return newest


def is_done(config: Config) -> bool:
    """Whether the bucket has the last checkpoint of this run in full; InputError if it has and resume=never."""
    remote, recorded = config.run.remote, recorded_at(config.run.remote)
    name = next(bucket.newest_first(remote), "") if recorded else ""
    if not recorded or not name or differences(recorded, config):
        return False
    _refuse_never(config, remote, "choose another --run.remote")
    return budget.is_done(flatten(config), bucket.read_trainer(remote, name))


def find_claimed(config: Config, name: str, token: str) -> Path | None:
    """The checkpoint of that name ("": none) on this rank: in the folder that rank 0 has claimed with `token`, or from
    the bucket where this rank does not see that folder.

    Raises InputError if there is no bucket then, or if its own folder holds another configuration's run.
    """
    run, checkpoints = Path(config.run.path), Path(config.run.path) / "checkpoints"
    if not ((claimed := run / ".claim").exists() and claimed.read_text() == token):
        if not config.run.remote:
            other = f"run.path '{run}' is not the same folder on every machine"
            raise InputError(f"{other}: put it on a shared file system, or set --run.remote=s3://bucket/prefix")
        if list(checkpoints.glob("step-*")) and (recorded := recorded_at(str(run.absolute()))):
            compare(recorded, config, f"'{run}' on {socket.gethostname()}", "--run.path")
        if name:
            checkpoints.mkdir(parents=True, exist_ok=True)
            with FileLock(checkpoints / ".download"):  # the ranks of a machine come one by one: the first one fetches
                if not is_complete(checkpoints / name):
                    with was_there(f"{config.run.remote}/checkpoints/{name}/{MANIFEST}"):  # when rank 0 asked
                        bucket.download(config.run.remote, name, checkpoints)
    return checkpoints / name if name else None
