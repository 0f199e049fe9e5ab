"""What a machine offers a run, and what stands in its way."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from pipeline.errors import InputError, Unavailable
from pipeline.storage.store import open_store

LIBRARIES = ("torch", "accelerate", "webdataset", "boto3", "safetensors", "tensorboard", "deepspeed", "transformers")
OPTIONAL = ("deepspeed", "transformers")
LEAST_DISK = 2**30
LEAST_SHARED_MEMORY = 64 * 2**20


def examine(say: Callable[[str], None]) -> list[str]:
    """Tell the machine's state line by line; returns the problems, each with its remedy."""
    import torch
    import torch.distributed as dist

    problems = []
    say(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in LIBRARIES:
        try:
            say(f"{name} {version(name)}")
        except PackageNotFoundError:
            say(f"{name} is not installed{' (optional)' if name in OPTIONAL else ''}")
            if name not in OPTIONAL:
                problems.append(f"{name} is missing: install the project again with pip install -e .")
    for line in describe_deepspeed():
        say(line)
    builds = faiss_builds()
    say(f"FAISS: {', '.join(builds) or 'none'}")
    problems += faiss_problems(builds)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    say(f"cores {cores}; training takes train.threads of them a rank, by default its share of all")
    omp = os.environ.get("OMP_NUM_THREADS", "not set")
    say(f"OMP_NUM_THREADS {omp}: other commands would use {torch.get_num_threads()} threads")
    gloo, nccl = (dist.is_available() and has() for has in (dist.is_gloo_available, dist.is_nccl_available))
    say(f"torch has gloo: {'yes' if gloo else 'no'}, NCCL: {'yes' if nccl else 'no'}")
    if torch.cuda.device_count() > 1 and not nccl:
        problems.append("this build of torch has no NCCL, by which GPUs talk: install one from https://pytorch.org")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            say(f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    else:
        say("no CUDA device: training runs on the processor, ranks talk through gloo")
    for place, least, what in ((".", LEAST_DISK, "disk here"), ("/dev/shm", LEAST_SHARED_MEMORY, "shared memory")):
        if not os.path.isdir(place):
            continue
        free = shutil.disk_usage(place).free
        say(f"{what}: {free / 2**30:.1f} GiB free")
        if free < least:
            remedy = "free some" if place == "." else "give the container more"
            problems.append(f"only {free / 2**20:.0f} MiB of {what}: {remedy}")
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the default of boto3"
    say(f"S3 endpoint: {re.sub(r'//[^/]*@', '//...@', address)}")
    return problems


def describe_deepspeed() -> list[str]:
    """Whether the installed DeepSpeed starts under Accelerate, found by loading both in another process; [] without it.

    No problem of the machine's: only runs that ask for DeepSpeed need it.
    """
    import torch

    try:
        names = f"deepspeed {version('deepspeed')} and accelerate {version('accelerate')}"
    except PackageNotFoundError:
        return []
    on_cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", "import deepspeed; from accelerate.utils import DeepSpeedPlugin; DeepSpeedPlugin()"],
        env={**on_cpu, **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [f"{names} do not load together ({last}): before a run asks for them, pip install -U -e '.[deepspeed]'"]
    return [f"{names} load together"]


def faiss_builds() -> list[str]:
    """The installed distributions that bring the `faiss` package, with versions."""
    found = {
        f"{name} {item.version}"
        for item in distributions()
        if (name := (item.metadata["Name"] or "").lower()).startswith("faiss")
    }
    return sorted(found)


def faiss_problems(builds: list[str]) -> list[str]:
    """Two builds overwrite each other's files in one folder, and which code runs is then an accident."""
    if len(builds) == 1:
        return []
    if not builds:
        return ["FAISS is missing: pip install faiss-cpu"]
    names = " ".join(build.split()[0] for build in builds)
    return [f"{len(builds)} builds of FAISS share one folder: pip uninstall -y {names}, then install just one of them"]


CHECKPOINTS = 3
"""For which there should be room: the two that are kept, and the one that is being written."""

PROBE = "preflight"
"""A file that is written to see that a bucket can be."""


def preflight(
    *,
    run: str,  # run.path
    remote: str,  # run.remote; '': none
    checkpoint_bytes: int,  # of a whole checkpoint, all ranks' files
    say: Callable[[str], None],  # what was found, a line each
) -> list[str]:
    """Warnings, each with its remedy. Leaves nothing behind but, where `remote` is a local folder, that folder.

    Raises InputError for what makes the run impossible, and Unavailable if the remote's server stays out of reach.
    """
    place = check_folder(run)
    warnings = check_disk(run, place, checkpoint_bytes, say)
    if remote:
        check_remote(remote)
        say(f"run.remote {remote} can be written")
    return warnings


def check_folder(run: str) -> Path:
    """The nearest folder above `run`, or itself, that exists. InputError if nothing can be written there."""
    place = Path(run).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"naign")
    except OSError as error:
        raise InputError(
            f"run.path '{run}' cannot be written: {place}: {(error.strerror or str(error)).lower()}: "
            "choose another --run.path"
        ) from None
    return place


def check_disk(run: str, place: Path, checkpoint_bytes: int, say: Callable[[str], None]) -> list[str]:
    """A warning if CHECKPOINTS do not fit on the disk of `place`; InputError if not even one does."""
    free = shutil.disk_usage(place).free
    found = f"run.path '{run}' has {size(free)} free, a checkpoint takes {size(checkpoint_bytes)}"
    say(found)
    if free < checkpoint_bytes:
        raise InputError(f"{found}: free some, or choose another --run.path")
    if free < CHECKPOINTS * checkpoint_bytes:
        return [
            f"{found}: {size(CHECKPOINTS * checkpoint_bytes)} would hold the {CHECKPOINTS - 1} that are kept and the "
            "one being written: free some, or set --checkpoint.keep=1"
        ]
    return []


def check_remote(remote: str) -> None:
    """Put and delete a small file; InputError as the store says it. Who may not delete keeps old checkpoints, too."""
    store = open_store(remote)
    refused = None
    try:
        store.put(PROBE, b"naign")
    except InputError as error:  # the file may be there, and only not be readable
        refused = error
    with contextlib.suppress(InputError, Unavailable):
        store.delete(PROBE)
    if refused:
        raise refused


def size(bytes: int) -> str:
    """In words, to one decimal."""
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"
