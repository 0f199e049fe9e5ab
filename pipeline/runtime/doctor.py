"""What a machine offers a run, and what stands in its way."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, version

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
            remedy = "free some" if place == "." else "give the container more, or set data.workers=0"
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
