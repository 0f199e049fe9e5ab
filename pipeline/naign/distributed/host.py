"""What a rank takes of its host: CPU threads, memory, GPUs that torch can use, and a build of FAISS."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

import joblib
import torch

from naign.errors import InputError, Unavailable, one_line

MAY_PASS = ("CUDA driver initialization failed", "CUDA unknown error", "No CUDA GPUs are available")
"""Parts of what torch says where GPUs or their driver are out of order: another host, or a reboot, may help."""

FAISS = "faiss-cpu faiss-gpu faiss-gpu-cuvs"  # the builds that write to one folder


def count_ranks(name: str = "LOCAL_WORLD_SIZE") -> int:
    """Ranks on this host or, of WORLD_SIZE, in all. InputError if a variable of the launcher is not a number."""
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(variable, "1")
        if not value.removeprefix("-").isdecimal():
            raise InputError(f"the environment's {variable} is {value[:40]!r}, which is not a number: unset it")
    return max(1, int(os.environ.get(name, "1")))


def set_threads(threads: int) -> None:
    """CPU threads of this rank. 0: OMP_NUM_THREADS, or its share of the cores under a launcher, which exports 1."""
    launched = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if threads:
        torch.set_num_threads(threads)
    elif launched or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, joblib.cpu_count() // count_ranks()))


def keep_memory() -> None:
    """Have glibc keep freed memory, on Linux: page faults of new tensors took 0.4 s of a CPU round of 2.0 s."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: the largest it takes


def count_gpus() -> int:
    """GPUs that torch can use on this host: 0 also where it is built without CUDA or its driver does not fit."""
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def check_gpus(asked: str, needed: int) -> None:
    """Raise an error that begins with `asked` if torch can use fewer than `needed` GPUs: InputError where it cannot use
    any on such a host, Unavailable where a GPU or its driver is missing today and may be back after a restart.
    """
    count = count_gpus()
    if needed <= count:
        return
    more = "nvidia.com/gpu in the pod's limits, --gpus-per-node under Slurm, CUDA_VISIBLE_DEVICES elsewhere"
    reason = f"a GPU may have failed; else ask for fewer, or give the host more: {more}"
    if not count:
        reason = why_none()
    message = f"{asked}: {needed} GPUs are needed on this host, torch can use {count}: {reason}"
    if count or any(sign in reason for sign in MAY_PASS):
        raise Unavailable(message)
    raise InputError(message)


def why_none() -> str:
    """Why torch can use no GPU here, and what to do about it."""
    build = f"torch {torch.__version__}"
    if not torch.backends.cuda.is_built():
        return f"{build} was built without CUDA: install a CUDA build of it, or take the image of --target cuda"
    try:
        torch.cuda.init()
        return "CUDA_VISIBLE_DEVICES may hide them"
    except RuntimeError as error:
        hint = "see nvidia-smi, CUDA_VISIBLE_DEVICES, and in a container nvidia.com/gpu or docker run --gpus all"
        return f"{one_line(error, 400)} ({build} is for CUDA {torch.version.cuda}): {hint}"


def why_unfit(index: int = 0) -> str:
    """Why the installed torch cannot compute on a GPU, as where it has no code for it; "" if it can."""
    try:
        torch.ones(1, device=f"cuda:{index}").add(1).item()
    except RuntimeError as error:
        card = f"GPU {index}, {torch.cuda.get_device_name(index)}, cannot be used by torch {torch.__version__}"
        return f"{card}: {one_line(error, 400)}: use another GPU or the CPU, or another build of torch"
    return ""


def faiss_builds() -> list[str]:
    """The builds of FAISS that share the package folder `faiss`, by name and version. Does not import FAISS."""
    builds = []
    for place in _find_faiss():
        for info in Path(place).parent.glob("faiss*-info"):
            package = Distribution.at(info)
            if any(file.parts[0] == "faiss" for file in package.files or ()):
                builds.append(f"{package.name} {package.version}")
    return sorted(builds)


def why_no_faiss() -> str:
    """Why FAISS cannot be used, and the remedy: it is missing, or two builds wrote over each other's files in one
    folder. Then it is an accident which code runs, and uninstalling one removes files of the other. "" if it can.
    """
    builds = faiss_builds()
    remedy = f"pip uninstall -y {FAISS}, then pip install faiss-cpu, or the GPU build as docs/gpus.md has it"
    if len(builds) > 1:
        return f"FAISS is a mixture of {' and '.join(builds)}: {remedy}"
    if not any(Path(place, "__init__.py").exists() for place in _find_faiss()):
        return f"FAISS is missing: {remedy}"
    return ""


def _find_faiss() -> Iterable[str]:
    """The folders of the package `faiss`."""
    spec = importlib.util.find_spec("faiss")
    return (spec and spec.submodule_search_locations) or ()
