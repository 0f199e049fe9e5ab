"""Where a model's weights are: in a file, a folder, a run, a bucket, on the hub, or in models/ of this package."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from naign import shipped
from naign.checkpoint.bucket import fetch_file, newest_first
from naign.checkpoint.writer import newest_checkpoint, passed_over
from naign.errors import Damaged, InputError, check_address, one_line
from naign.model import hub
from naign.storage.store import is_in_bucket, open_store

log = logging.getLogger("naign.model")

FILES = ("ema.safetensors", "model.safetensors")  # the first that is there


class Weights(NamedTuple):
    file: Path
    checkpoint: str = ""  # of a run: its name


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
    """The weights of a run in a bucket, of its newest undamaged checkpoint."""
    for name in newest_first(remote):
        try:
            return Weights(fetch_file(remote, name, FILES, folder), name)
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
    checkpoints = folder / "checkpoints"
    checkpoint = newest_checkpoint(checkpoints)
    damaged = passed_over(checkpoints, checkpoint)
    for each in damaged:
        log.warning("%s is damaged or incomplete: skipped", each)
    if damaged and not checkpoint:
        raise InputError(f"all checkpoints of '{folder}' are damaged or incomplete: copy one again, or train anew")
    for file in ((checkpoint or folder) / name for name in FILES):
        if file.is_file():
            return Weights(file, checkpoint.name) if checkpoint else Weights(file)
    nothing = f"'{folder}' has no complete checkpoint and no model.safetensors"
    raise InputError(f"{nothing}: has its training got that far?")
