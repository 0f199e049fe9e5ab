"""Checks of the machine, for `naign doctor`, and of where a run writes, in its first second.

A check yields pairs (what it observes, remedy); the remedy is "" where nothing is wrong.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from naign import philox
from naign.distributed.connect import repeat_bits
from naign.distributed.host import check_versions, count_gpus, describe_faiss, why_no_faiss, why_none, why_unfit
from naign.errors import InputError, bytes_in_words, require
from naign.storage.store import check_writable, open_store

LIBRARIES = ("torch", "accelerate", "webdataset", "boto3", "safetensors", "tensorboard", "deepspeed", "transformers")
OPTIONAL = ("deepspeed", "transformers")
LEAST_DISK = 2**30  # free bytes that `naign doctor`, which knows no run, asks for
CHECKPOINTS = 3  # how many should fit on the disk: the two that are kept and the one being written
UNTRUSTED = "its numbers cannot be trusted: update the driver, install torch for it, or take another card"


def libraries() -> Iterator[tuple[str, str]]:
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}", ""
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}", ""
        except PackageNotFoundError:
            yield f"{name} is not installed", "" if name in OPTIONAL else "install again: pip install -e ."
    for name in ("torch", "accelerate"):
        try:
            check_versions(name)
        except InputError as error:
            yield f"{name} cannot be used", str(error)


def faiss() -> Iterator[tuple[str, str]]:
    yield describe_faiss(), why_no_faiss()


def gpus() -> Iterator[tuple[str, str]]:
    gloo, nccl = (dist.is_available() and has() for has in (dist.is_gloo_available, dist.is_nccl_available))
    count = count_gpus()
    remedy = "GPUs need NCCL to communicate: install a build of torch with it from https://pytorch.org"
    text = f"torch has gloo: {'yes' if gloo else 'no'}, NCCL: {'yes' if nccl else 'no'}"
    yield text, remedy if count > 1 and not nccl else ""
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB", (problem := why_unfit(index))
        for text, remedy in () if problem else self_test(torch.device("cuda", index)):
            yield f"GPU {index}: {text}", remedy
    if not count:
        yield f"no CUDA device ({why_none()}): training runs on the processor, ranks communicate by gloo", ""


def self_test(device: torch.device) -> Iterator[tuple[str, str]]:
    """Whether a device computes what the CPU does, and the same bits each time."""
    ids = torch.tensor([0, 1, 5, 2**40 + 3, 2**61 + 7])
    expected, drawn = (philox.uniform(3, 2, ids, (3, 32, 32), where).cpu() for where in ("cpu", device))
    wrong = int((expected != drawn).sum())
    yield f"random numbers other than the CPU's: {wrong} of {drawn.numel()}", UNTRUSTED if wrong else ""

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, weights = torch.randn(8, 16, 28, 28), torch.randn(32, 16, 3, 3)
    on_cpu = convolve(images.clone(), weights.clone())
    first, second = (convolve(images.to(device), weights.to(device)) for _ in range(2))
    error = max(float((a - b.cpu()).norm() / a.norm()) for a, b in zip(on_cpu, first, strict=True))
    yield f"a convolution and its gradients differ from the CPU's by {error:.1e}", UNTRUSTED if error > 1e-2 else ""

    other = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    remedy = "resumed runs would not repeat their bits on it: report the card and the version of torch"
    yield f"of three results {other} have other bits the second time", remedy if other else ""


def convolve(images: Tensor, weights: Tensor) -> list[Tensor]:
    """A convolution and its two gradients, by the algorithms that training uses on a GPU."""
    if images.is_cuda:
        repeat_bits()
    images, weights = images.requires_grad_(), weights.requires_grad_()
    out = F.conv2d(images, weights, padding=1)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), (images, weights))]


def disk() -> Iterator[tuple[str, str]]:
    free = shutil.disk_usage(".").free
    yield f"disk here: {bytes_in_words(free)} free", "free some" if free < LEAST_DISK else ""


CHECKS: tuple[Callable[[], Iterator[tuple[str, str]]], ...] = (libraries, gpus, faiss, disk)


def examine() -> Iterator[dict[str, str]]:
    """What all checks find, one by one: the name of the check, text, and remedy."""
    for check in CHECKS:
        for text, remedy in check():
            yield {"check": check.__name__, "text": text, "remedy": remedy}


def preflight(run: str, remote: str, checkpoint_bytes: int) -> list[str]:
    """Check what a run with run.path, run.remote ("": none) and checkpoints of that size needs; returns warnings.

    Leaves nothing behind but the folder of a local `remote`. Raises InputError for what makes the run impossible, and
    Unavailable if the bucket stays out of reach.
    """
    require((not (problem := why_no_faiss()), problem))
    folder = Path(run).absolute()
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"naign")
    except OSError as error:
        why = f"{place}: {(error.strerror or str(error)).lower()}"
        raise InputError(f"run.path '{run}' cannot be written: {why}: choose another --run.path") from None
    free, needed = shutil.disk_usage(place).free, CHECKPOINTS * checkpoint_bytes
    text = f"run.path '{run}' has {bytes_in_words(free)} free, a checkpoint takes {bytes_in_words(checkpoint_bytes)}"
    require((free >= checkpoint_bytes, f"{text}: free some, or choose another --run.path"))
    if remote:
        check_writable(open_store(remote), "run.remote")
    room = f"the {CHECKPOINTS - 1} that are kept and the one being written need {bytes_in_words(needed)}"
    return [f"{text}: {room}: free some, or set --checkpoint.keep=1"] if free < needed else []
