"""The supported versions of torch, Accelerate and DeepSpeed, and what is used of them beyond their public API."""

import pkgutil
from importlib.metadata import version
from typing import NoReturn

from pipeline.errors import InputError

TESTED = {"torch": ">=2.13,<2.14", "accelerate": ">=1.10,<1.16", "deepspeed": ">=0.17,<0.20"}
"""The versions that pass the tests. pyproject.toml admits newer ones, as long as they have the INTERNALS."""

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
"""Names that may change with any release, by library. zero.py checks those of DeepSpeed's objects itself."""


def check_versions(*libraries: str) -> None:
    """Raise InputError where an installed library lacks one of its INTERNALS. Imports the libraries."""
    for library in libraries:
        missing = []
        for name in INTERNALS[library]:
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                missing.append(name)
        if missing:
            refuse(library, ", ".join(missing))


def refuse(library: str, missing: str) -> NoReturn:
    """Raise the InputError about what the installed version of a library does not have."""
    remedy = f"pip install '{library}{TESTED[library]}'"
    raise InputError(f"{library} {version(library)} has no {missing}; tested versions have: {remedy}")
