"""Which configuration of Accelerate starts a host's ranks, and whether the host has the GPUs that it wants."""

import os
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InputError, one_line
from pipeline.shipped import shipped

STARTS = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "False"),
    "mixed_precision": ("no", "fp16", "bf16", "None", "False"),
}
"""What a configuration of Accelerate may say for training to start; no without quotes is False in YAML."""


def find_engine(name: str, ranks: int) -> str:
    """The text of an Accelerate configuration: a file's, that of a name in launch/, or DDP on this machine."""
    if name:
        from accelerate.commands.config.config_args import load_config_from_file

        for file in (Path(name), shipped(f"launch/{name}.yaml"), shipped(f"launch/{name}")):
            if os.path.isfile(file):
                try:
                    found: Any = load_config_from_file(str(file))
                    for key, possible in STARTS.items():
                        value = getattr(found, key)
                        if str(getattr(value, "value", value)) not in possible:
                            raise ValueError(f"{key} is {value}: it must be one of {', '.join(possible[:4])}")
                    return file.read_text()
                except Exception as error:  # of many kinds
                    reason = one_line(error, 200)
                    raise InputError(f"--engine {file} is no configuration of Accelerate: {reason}") from None
        known = ", ".join(sorted(file.stem for file in shipped("launch").glob("*.yaml")))
        raise InputError(f"--engine {name} is no file and no name in launch/{': ' + known if known else ''}")
    use_cpu, precision = without_engine()
    return (
        f"{{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_GPU, use_cpu: {use_cpu}, num_machines: 1, "
        f'num_processes: {ranks}, machine_rank: 0, mixed_precision: "{precision}", rdzv_backend: static, '
        "same_network: true}\n"
    )


def count_gpus() -> int:
    """GPUs of this host."""
    from pipeline.distributed import gpus

    return gpus.count_gpus()


def without_engine() -> tuple[str, str]:
    """use_cpu and mixed_precision, as in launch/gpus.yaml and launch/cpu.yaml; train.precision overrides it."""
    return ("false", "bf16") if count_gpus() else ("true", "no")


def check_gpus(wanted: int, processes: int, engine: str) -> None:
    """Raise InputError or Unavailable where this host lacks GPUs, for `wanted` of --gpus or for its ranks."""
    from pipeline.distributed import gpus

    gpus.check_gpus(f"--gpus {wanted}", wanted)
    found = yaml.safe_load(engine)
    on_gpus = count_gpus() or found.get("distributed_type") == "MULTI_GPU"  # DeepSpeed takes CPUs, too
    if on_gpus and not found.get("use_cpu"):
        gpus.check_gpus(f"{processes} ranks on GPUs are to start here (on CPUs: --engine cpu)", processes)
