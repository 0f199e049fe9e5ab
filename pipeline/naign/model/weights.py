"""Where a model's weights are: in a file, a folder, a run, a bucket, on the hub, or in models/ of this package."""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from naign import shipped
from naign.checkpoint.bucket import fetch_file, newest_first
from naign.checkpoint.manifest import best_named, read_best
from naign.checkpoint.writer import is_complete, newest_checkpoint, passed_over
from naign.errors import Damaged, InputError, check_address, one_line
from naign.model import hub
from naign.settings.budget import is_exhausted
from naign.storage.store import is_in_bucket, open_store

log = logging.getLogger("naign.model")

FILES = ("ema.safetensors", "model.safetensors")  # the first that is there


class Weights(NamedTuple):
    file: Path
    checkpoint: str = ""  # of a run: its name
    choice: str = ""  # of a run: best, or last


def shipped_model(place: str | Path) -> Path | None:
    """The weights of the model in models/ of that name; None where there is none, and for the name of any path."""
    name = str(place)
    return shipped("models") / name / hub.WEIGHTS if name in _shipped_names() and not os.path.lexists(name) else None


def _shipped_names() -> list[str]:
    return sorted(file.parent.name for file in shipped("models").glob(f"*/{hub.WEIGHTS}"))


@contextmanager
def locate(place: str | Path, **download: Any) -> Iterator[Weights]:
    """The file with the weights of `place`, as NAIGN.from_pretrained chooses it; of a bucket that one file is fetched,
    and is temporary. `download` is for hf:// alone (`hub.download`). InputError if there is none.
    """
    check_address(str(place))
    if str(place).startswith(hub.PREFIX):
        yield Weights(hub.download(str(place).removeprefix(hub.PREFIX), **download))
    elif is_in_bucket(place):
        open_store(str(place))  # refuses what is no address
        with tempfile.TemporaryDirectory() as folder:
            yield _fetch(str(place).rstrip("/"), Path(folder))
    else:
        named = shipped_model(place)
        hint = "reinstall naign, which it comes with" if named else "it hides the model that comes with naign"
        try:
            yield Weights(named) if named else _find(Path(place))
        except InputError as error:
            raise (InputError(f"{error}; {hint}") if str(place) in _shipped_names() else error) from None


def _fetch(remote: str, folder: Path) -> Weights:
    """The weights of a run in a bucket, of its best or newest undamaged checkpoint."""
    names = list(newest_first(remote))
    best = best_named(remote) if names and _ended_by_patience(remote, names[0]) else ""
    for name in [*([best] if best in names else []), *names]:
        try:
            return Weights(fetch_file(remote, name, FILES, folder), name, "best" if name == best else "last")
        except Damaged as error:
            log.warning("%s/checkpoints/%s is damaged and skipped: %s", remote, name, one_line(error))
    raise InputError(f"{remote} holds no complete checkpoint: has the training written one yet?")


def _find(folder: Path) -> Weights:
    """The weights of a run, a checkpoint or an exported folder on this machine."""
    if os.path.isfile(folder):  # False also for what no file could be called
        return Weights(folder)
    if not os.path.isdir(folder):
        elsewhere = "a model of the Hugging Face hub is hf://user/model, a run in a bucket s3://bucket/prefix"
        elsewhere += "".join(f"; the one that comes with naign is {each}, no slash" for each in _shipped_names())
        raise InputError(f"no run or model at '{folder}': there is no {os.path.abspath(folder)}; {elsewhere}")
    run, checkpoints = str(folder.absolute()), folder / "checkpoints"
    checkpoint, choice = newest_checkpoint(checkpoints), "last"
    damaged = passed_over(checkpoints, checkpoint)
    for each in damaged:
        log.warning("%s is damaged or incomplete: skipped", each)
    if damaged and not checkpoint:
        raise InputError(f"all checkpoints of '{folder}' are damaged or incomplete: copy one again, or train anew")
    if checkpoint and _ended_by_patience(run, checkpoint.name):
        best = checkpoints / best_named(run)
        if is_complete(best):
            checkpoint, choice = best, "best"
    for file in ((checkpoint or folder) / name for name in FILES):
        if file.is_file():
            return Weights(file, checkpoint.name, choice) if checkpoint else Weights(file)
    nothing = f"'{folder}' has no complete checkpoint and no model.safetensors"
    raise InputError(f"{nothing}: has its training got that far?")


def _ended_by_patience(run: str, newest: str) -> bool:
    """Whether quality.patience ended a run, in a folder or a bucket, whose newest checkpoint is that one."""
    try:
        sections = yaml.safe_load(open_store(run).read("config.yaml"))
        settings = {f"{name}.{key}": sections[name][key] for name in ("quality", "data") for key in sections[name]}
        rounds = json.loads(open_store(f"{run}/checkpoints/{newest}").read("trainer.json"))["round"]
        return is_exhausted(settings, rounds, read_best(run))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return False  # a file is missing, or was written by another program
