"""Checks of the machine, for `naign doctor`, and of where a run writes, in its first second."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import joblib
import psutil
import torch

from naign.distributed.connect import choose_precision
from naign.distributed.host import count_gpus, faiss_builds, why_no_faiss, why_none, why_unfit
from naign.errors import bytes_in_words, require, unwritten
from naign.storage.store import check_writable, open_store

LIBRARIES = ("torch", "accelerate", "webdataset", "boto3", "safetensors", "tensorboard")
TESTED = ("2.10", "2.13")
"""Versions of torch."""
LEAST_DISK = 2**30  # free bytes that `naign doctor`, which knows no run, asks for
CHECKPOINTS = 3  # how many should fit on the disk: the two that are kept and the one being written


def examine() -> Iterator[tuple[str, str]]:
    """What is found on this machine, one by one, and the remedy: "" where nothing is wrong."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}", ""
    yield ", ".join(f"{name} {version(name)}" for name in LIBRARIES), ""
    if not version("torch").startswith(TESTED):
        yield f"torch was tested with {' and '.join(TESTED)}, not with this version", ""
    yield f"{joblib.cpu_count()} cores, {bytes_in_words(psutil.virtual_memory().total)} of memory", ""
    count = count_gpus()
    yield f"train.precision=auto is {choose_precision(on_cpu=count == 0)}", ""
    if count == 0:
        yield f"no CUDA device ({why_none()}): training runs on the processor, ranks communicate by gloo", ""
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {device.name}, {bytes_in_words(device.total_memory)}", why_unfit(index)
    yield f"FAISS: {', '.join(faiss_builds()) or 'none'}", why_no_faiss()
    free = shutil.disk_usage(".").free
    yield f"disk here: {bytes_in_words(free)} free", "" if free >= LEAST_DISK else "free some"


def preflight(run: str, remote: str, checkpoint_bytes: int) -> list[str]:
    """Check what a run with run.path, run.remote ("": none) and checkpoints of that size needs; returns warnings.

    Leaves nothing behind but the folder of a local `remote`. Raises InputError for what makes the run impossible, and
    Unavailable if the bucket stays out of reach.
    """
    problem = why_no_faiss()
    require((not problem, problem))
    place = Path(run).absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"naign")
    except OSError as error:
        failed = f"run.path '{run}' cannot be written: {place}: {error.strerror or error}"
        raise unwritten(f"{failed}: choose another --run.path") from None
    free = shutil.disk_usage(place).free
    text = f"run.path '{run}' has {bytes_in_words(free)} free, a checkpoint takes {bytes_in_words(checkpoint_bytes)}"
    require((free >= checkpoint_bytes, f"{text}: free some, or choose another --run.path"))
    if remote:
        check_writable(open_store(remote), "run.remote")
    needed = CHECKPOINTS * checkpoint_bytes
    if free >= needed:
        return []
    room = f"the {CHECKPOINTS - 1} that are kept and the one being written need {bytes_in_words(needed)}"
    return [f"{text}: {room}: free some, or set --checkpoint.keep=1"]
