"""Checks of the machine and of where a run writes: all of them by `naign doctor`, those of a run in its first second.

A check yields pairs (what it observes, remedy); the remedy is "" where nothing is wrong. It raises InputError or
Unavailable for what makes a run impossible.
"""

import contextlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.distributed.gpus import count_gpus, why_none
from pipeline.distributed.versions import check_versions
from pipeline.errors import InputError, Unavailable, bytes_in_words
from pipeline.observe.self_test import ring, self_test
from pipeline.observe.trackers import find_trackers
from pipeline.storage.store import open_store

LIBRARIES = ("torch", "accelerate", "webdataset", "boto3", "safetensors", "tensorboard", "deepspeed", "transformers")
OPTIONAL = ("deepspeed", "transformers")
LEAST_DISK = 2**30  # free bytes that `naign doctor`, which knows no run, asks for
CHECKPOINTS = 3  # how many should fit on the disk: the two that are kept and the one being written
SHARED_MEMORY, LEAST_SHARED_MEMORY = "/dev/shm", 64 * 2**20
PROBE = "preflight"  # the file that is written to test whether a bucket is writable


class Needs(NamedTuple):
    """What a run asks of the machine. The defaults are those of `naign doctor`."""

    run: str = ""  # run.path
    remote: str = ""  # run.remote; '': none
    checkpoint_bytes: int = 0  # of a whole checkpoint, all ranks' files
    trackers: str = "tensorboard"  # report.trackers


class Finding(NamedTuple):
    """An observation of a check."""

    check: str  # its name
    text: str
    remedy: str  # "" where nothing is wrong


Check = Callable[[Needs], Iterator[tuple[str, str]]]


def libraries(needs: Needs) -> Iterator[tuple[str, str]]:
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}", ""
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}", ""
        except PackageNotFoundError:
            if name in OPTIONAL:
                yield f"{name} is not installed (optional)", ""
            else:
                yield f"{name} is not installed", "install again: in a checkout, pip install -e ."
    for name in ("torch", "accelerate"):
        try:
            check_versions(name)
        except InputError as error:
            yield f"{name} cannot be used", str(error)


def faiss_builds() -> list[str]:
    """The installed distributions that bring the `faiss` package, with versions."""
    names = ((item.metadata["Name"] or "").lower() + f" {item.version}" for item in distributions())
    return sorted({name for name in names if name.startswith("faiss")})


def faiss(needs: Needs) -> Iterator[tuple[str, str]]:
    """Two builds overwrite each other's files in one folder, so that which code runs is an accident.

    Raises InputError for a run.
    """
    builds = faiss_builds()
    text = f"FAISS: {', '.join(builds) or 'none'}"
    remedy = "" if builds else "FAISS is missing: pip install faiss-cpu"
    if len(names := sorted({build.split()[0] for build in builds})) > 1:
        remedy = f"builds of FAISS share one folder: pip uninstall -y {' '.join(names)}, then install just one of them"
        if needs.run:
            raise InputError(f"{text}: {remedy}")
    yield text, remedy


def processor(needs: Needs) -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield f"cores {cores}; training uses train.threads of them per rank, by default an equal share", ""
    threads, used = os.environ.get("OMP_NUM_THREADS", "not set"), torch.get_num_threads()
    rule = f"commands use {used} threads, as does `python pipeline/train.py`; under a launcher train.threads decides"
    yield f"OMP_NUM_THREADS {threads}: {rule}", ""


def gpus(needs: Needs) -> Iterator[tuple[str, str]]:
    gloo, nccl = (dist.is_available() and has() for has in (dist.is_gloo_available, dist.is_nccl_available))
    count = count_gpus()
    remedy = "GPUs need NCCL to communicate: install a build of torch with it from https://pytorch.org"
    text = f"torch has gloo: {'yes' if gloo else 'no'}, NCCL: {'yes' if nccl else 'no'}"
    yield text, remedy if count > 1 and not nccl else ""
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB", ""
        if not needs.run:  # before a run it would last too long
            for text, remedy in self_test(torch.device("cuda", index)):
                yield f"GPU {index}: {text}", remedy
    if count > 1 and nccl and not needs.run:
        yield from ring("nccl", count)
    if not count:
        yield f"no CUDA device ({why_none()})", ""
        yield "training runs on the processor, ranks communicate by gloo", ""


def endpoint(needs: Needs) -> Iterator[tuple[str, str]]:
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the default of boto3"
    shown = re.sub(r"://\S*@", "://...@", address)
    yield f"S3 endpoint: {shown}", ""


def disk(needs: Needs) -> Iterator[tuple[str, str]]:
    """Whether run.path is writable and has room. Raises InputError if it is not, or not even one checkpoint fits."""
    if not needs.run:
        free = shutil.disk_usage(".").free
        yield f"disk here: {bytes_in_words(free)} free", "free some" if free < LEAST_DISK else ""
        return
    place = Path(needs.run).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"naign")
    except OSError as error:
        why = f"{place}: {(error.strerror or str(error)).lower()}"
        raise InputError(f"run.path '{needs.run}' cannot be written: {why}: choose another --run.path") from None
    free, size = shutil.disk_usage(place).free, needs.checkpoint_bytes
    text = f"run.path '{needs.run}' has {bytes_in_words(free)} free, a checkpoint takes {bytes_in_words(size)}"
    if free < size:
        raise InputError(f"{text}: free some, or choose another --run.path")
    room = f"the {CHECKPOINTS - 1} that are kept and the one being written need {bytes_in_words(CHECKPOINTS * size)}"
    yield text, f"{room}: free some, or set --checkpoint.keep=1" if free < CHECKPOINTS * size else ""


def shared_memory(needs: Needs) -> Iterator[tuple[str, str]]:
    """Whether NCCL has room for its buffers between the GPUs of a machine."""
    if os.path.isdir(SHARED_MEMORY):
        free = shutil.disk_usage(SHARED_MEMORY).free
        remedy = "give the container more (docker run --shm-size, or in Kubernetes an emptyDir of medium Memory)"
        yield f"shared memory: {bytes_in_words(free)} free", remedy if free < LEAST_SHARED_MEMORY else ""


def remote(needs: Needs) -> Iterator[tuple[str, str]]:
    """Put and delete a small file. Raises the store's error; permission to delete is not required."""
    if not needs.remote:
        return
    store, refused = open_store(needs.remote), None
    try:
        store.put(PROBE, b"naign")
    except InputError as error:  # the file may be written, and only not be readable
        refused = error
    with contextlib.suppress(InputError, Unavailable):
        store.delete(PROBE)
    if refused:
        raise refused
    yield f"run.remote {needs.remote} can be written", ""


def trackers(needs: Needs) -> Iterator[tuple[str, str]]:
    """Raises InputError for a tracker that is not known, or whose package is not there."""
    whose = "" if needs.run else " of the default configuration"
    yield f"trackers{whose}: {', '.join(find_trackers(needs.trackers))}", ""


OF_A_RUN: tuple[Check, ...] = (faiss, trackers, disk, remote)
CHECKS: tuple[Check, ...] = (libraries, processor, gpus, shared_memory, *OF_A_RUN, endpoint)


def findings(needs: Needs, checks: Sequence[Check]) -> Iterator[Finding]:
    """Run checks one by one. Raises InputError or Unavailable for what makes a run impossible."""
    for check in checks:
        for text, remedy in check(needs):
            yield Finding(check.__name__, text, remedy)


def problems(findings: Iterable[Finding]) -> list[str]:
    """The findings that need a remedy, each with it."""
    return [f"{finding.text}: {finding.remedy}" for finding in findings if finding.remedy]


def preflight(needs: Needs) -> list[str]:
    """Run the checks of a run and return its problems. Leaves nothing behind but the folder of a local `remote`.

    Raises InputError for what makes the run impossible, and Unavailable if the bucket stays out of reach.
    """
    return problems(findings(needs, OF_A_RUN))
