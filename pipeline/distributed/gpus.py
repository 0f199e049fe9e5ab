"""Whether torch can use the GPUs that are asked for on this host, and if not, why and what to do."""

import re

import torch

from pipeline.errors import InputError, Unavailable, one_line

NO_DRIVER, OLD_DRIVER = "Found no NVIDIA driver", r"driver on your system is too old \(found version (\d+)\)"
MORE = "nvidia.com/gpu in the pod's limits, --gpus-per-node under Slurm, CUDA_VISIBLE_DEVICES elsewhere"
BROKEN = ("CUDA driver initialization failed", "CUDA unknown error")
"""Parts of what torch says where it cannot use a GPU; BROKEN: where another host, or a reboot, may help."""


def count_gpus() -> int:
    """GPUs that torch can use on this host: 0 also where it is built without CUDA or its driver does not fit."""
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def check_gpus(asked: str, needed: int) -> None:
    """Raise InputError, or Unavailable for a driver out of order, where torch can use fewer than `needed` GPUs.

    `asked` begins the message: what asks for them.
    """
    if needed <= (count := count_gpus()):
        return
    reason = f"ask for fewer, or give the host more: {MORE}" if count else why_none()
    kind = Unavailable if any(sign in reason for sign in BROKEN) else InputError
    raise kind(f"{asked}: {needed} GPUs are needed on this host, torch can use {count}: {reason}")


def why_none() -> str:
    """Why torch can use no GPU here, and what to do about it."""
    build = f"torch {torch.__version__}"
    if not torch.backends.cuda.is_built():
        return f"{build} was built without CUDA: install a CUDA build of it, or take the image of --target cuda"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        message, short = str(error), one_line(error)
    else:
        return "CUDA_VISIBLE_DEVICES may hide them"
    if NO_DRIVER in message:
        return (
            "there is no NVIDIA driver: install it, or in a container let NVIDIA's runtime bring it "
            "(nvidia.com/gpu in the pod's limits, docker run --gpus all)"
        )
    if old := re.search(OLD_DRIVER, message):
        version = f"{int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}"
        return (
            f"the NVIDIA driver is for CUDA {version} at most, {build} needs one for CUDA {torch.version.cuda}: update "
            "the driver, or install an older build"
        )
    return f"{short}: see nvidia.com/gpu in the pod's limits, CUDA_VISIBLE_DEVICES, and nvidia-smi"


def check_bf16() -> None:
    """Raise InputError where the GPU has no bfloat16 arithmetic of its own."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        card = torch.cuda.get_device_name()
        raise InputError(
            f"train.precision is bf16, which {card} only emulates: use --train.precision=fp16, fp32 or auto"
        )
