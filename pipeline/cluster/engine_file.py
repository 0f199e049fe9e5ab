"""Which configuration of Accelerate starts a host's ranks, and whether the host has the GPUs that it wants."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from pipeline import shipped
from pipeline.errors import InputError, one_line

STARTS = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "False"),
    "mixed_precision": ("no", "fp16", "bf16", "None", "False"),
}
"""What a configuration of Accelerate may say for training to start; no without quotes is False in YAML."""


def find_engine(name: str, ranks: int, precision: str = "") -> str:
    """The text of an Accelerate configuration: a file's, that of a name in launch/, or DDP on this machine, there for
    train.precision=`precision`.
    """
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
                    text = file.read_text()
                    content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
                    check_deepspeed(content.get("deepspeed_config") or {})
                    return yaml.safe_dump(content) if file.suffix == ".json" else text
                except Exception as error:  # of many kinds
                    reason = one_line(error, 200)
                    raise InputError(f"--engine {file} is no configuration of Accelerate: {reason}") from None
        known = ", ".join(sorted(file.stem for file in shipped("launch").glob("*.yaml")))
        raise InputError(f"--engine {name} is no file and no name in launch/{': ' + known if known else ''}")
    use_cpu, mixed = without_engine(precision)
    return (
        f"{{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_GPU, use_cpu: {use_cpu}, num_machines: 1, "
        f'num_processes: {ranks}, machine_rank: 0, mixed_precision: "{mixed}", rdzv_backend: static, '
        "same_network: true}\n"
    )


def count_gpus() -> int:
    """GPUs of this host."""
    from pipeline.distributed import gpus

    return gpus.count_gpus()


def check_deepspeed(settings: dict[str, Any]) -> None:
    """Raise ValueError for what Accelerate only refuses in the ranks."""
    if str(stage := settings.get("zero_stage", 0)) not in ("0", "1", "2", "3"):
        raise ValueError(f"deepspeed_config.zero_stage is {stage}: it must be 0, 1, 2 or 3")
    file = settings.get("deepspeed_config_file")
    if file and file != "none" and not os.path.isfile(str(file)):
        raise ValueError(f"deepspeed_config_file {file}: no such file")


def without_engine(precision: str) -> tuple[str, str]:
    """use_cpu and mixed_precision, as in launch/gpus.yaml and launch/cpu.yaml, but that train.precision decides."""
    return ("false", "no" if precision else "bf16") if count_gpus() else ("true", "no")


def check_gpus(wanted: int, processes: int, engine: str) -> None:
    """Raise InputError or Unavailable where this host lacks GPUs, for `wanted` of --gpus or for its ranks."""
    from pipeline.distributed import gpus

    gpus.check_gpus(f"--gpus {wanted}", wanted)
    found = yaml.safe_load(engine)
    on_gpus = count_gpus() or found.get("distributed_type") == "MULTI_GPU"  # DeepSpeed takes CPUs, too
    if on_gpus and not found.get("use_cpu"):
        gpus.check_gpus(f"{processes} ranks on GPUs are to start here (on CPUs: --engine cpu)", processes)
