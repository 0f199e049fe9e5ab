"""Where the weights of a model are: in a file, an exported folder, a checkpoint, a run, a run's bucket, or on the hub.

Of a run it is the newest complete checkpoint; of a checkpoint the moving average, if it has one.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.bucket import fetch_file, newest_first
from pipeline.checkpoint.writer import newest_checkpoint, passed_over
from pipeline.errors import Damaged, InputError, one_line
from pipeline.model import hub

log = logging.getLogger("naign.model")

FILES = ("ema.safetensors", "model.safetensors")  # the first that is there


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    file: Path
    checkpoint: str = ""
    """Of a run: the name of the checkpoint."""


@contextmanager
def locate(place: str | Path, **download: Any) -> Iterator[Weights]:
    """The file with the weights of `place`, which may be temporary; `download` is for hf:// alone (`hub.download`).

    Of a bucket that one file is fetched. Raises InputError, which names what was looked for where, if there is none.
    """
    if hub.is_hub_name(place):
        yield Weights(file=hub.download(str(place).removeprefix(hub.PREFIX), **download))
    elif str(place).startswith("s3:"):
        with tempfile.TemporaryDirectory() as folder:
            yield _fetch(str(place).rstrip("/"), Path(folder))
    else:
        yield _find(Path(place))


def _fetch(remote: str, folder: Path) -> Weights:
    """The weights of a run in a bucket, of its newest undamaged checkpoint."""
    for name in newest_first(remote):
        try:
            return Weights(file=fetch_file(remote, name, FILES, folder), checkpoint=name)
        except Damaged as error:
            log.warning("%s/checkpoints/%s is damaged and skipped: %s", remote, name, one_line(error))
    raise InputError(f"{remote} holds no complete checkpoint: has the training written one yet?")


def _find(folder: Path) -> Weights:
    """The weights of a run, a checkpoint or an exported folder on this machine."""
    if os.path.isfile(folder):  # False also for what no file could be called
        return Weights(file=folder)
    if not os.path.isdir(folder):
        elsewhere = "a model of the Hugging Face hub is hf://user/model, a run in a bucket s3://bucket/prefix"
        raise InputError(f"no run or model at '{folder}': there is no {os.path.abspath(folder)}; {elsewhere}")
    checkpoints = folder / "checkpoints"
    checkpoint = newest_checkpoint(checkpoints)
    for damaged in passed_over(checkpoints, checkpoint):
        log.warning("%s is damaged or incomplete: skipped", damaged)
    for name in FILES:
        if checkpoint and (checkpoint / name).is_file():
            return Weights(file=checkpoint / name, checkpoint=checkpoint.name)
        if not checkpoint and (folder / name).is_file():
            return Weights(file=folder / name)
    raise InputError(f"'{folder}' has no complete checkpoint and no model.safetensors: has its training got that far?")
