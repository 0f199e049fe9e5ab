"""The supported versions of torch, Accelerate and DeepSpeed, and what is used of them beyond their public API."""

import pkgutil
from importlib.metadata import version
from typing import NoReturn

from pipeline.errors import InputError

TESTED = {"torch": ">=2.13,<2.14", "accelerate": ">=1.10,<1.16", "deepspeed": ">=0.17,<0.20"}
"""The versions that the tests pass with. pyproject.toml admits newer ones, up to the next major version."""

INTERNALS = {
    "torch": ("torch.distributed.distributed_c10d._get_default_store",),
    "accelerate": (
        "accelerate.commands.config.config_args.load_config_from_file",
        "accelerate.commands.launch.launch_command",
        "accelerate.commands.launch.launch_command_parser",
    ),
    "deepspeed": (
        "deepspeed.ops.__compatible_ops__",
        "deepspeed.runtime.engine.DeepSpeedEngine.get_global_grad_norm",
        "deepspeed.runtime.engine.DeepSpeedEngine.set_gradient_accumulation_boundary",
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        "deepspeed.utils.safe_set_local_fp32_param",
        "deepspeed.utils.safe_set_local_optimizer_state",
    ),
}
"""Names without a promise of stability, by library. Attributes of DeepSpeed's objects are checked in engine.py."""


def check_versions(*libraries: str) -> None:
    """Raise InputError where an installed library lacks one of its INTERNALS. Imports the libraries."""
    for library in libraries:
        missing = [name for name in INTERNALS[library] if not _exists(name)]
        if missing:
            refuse(library, ", ".join(missing))


def refuse(library: str, missing: str) -> NoReturn:
    """Raise the InputError about an internal that the installed version does not have."""
    raise InputError(
        f"{library} {version(library)} has no {missing}, which this program needs; it was tested with {library}"
        f"{TESTED[library]}: pip install '{library}{TESTED[library]}'"
    )


def _exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
