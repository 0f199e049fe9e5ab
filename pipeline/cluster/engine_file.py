"""Which configuration of Accelerate starts a host's ranks, and whether the host has the GPUs that it wants."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from pipeline import shipped
from pipeline.errors import InputError, one_line

POSSIBLE = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "False"),
    "mixed_precision": ("no", "fp16", "bf16", "None", "False"),
}
"""Values of a configuration of Accelerate with which training can start; `no` without quotes is False in YAML."""


def find_engine(name: str, ranks: int, precision: str = "") -> str:
    """The text of an Accelerate configuration: of the file `name`, of the file of that name in launch/, or, for '', of
    DDP over `ranks` ranks with train.precision=`precision`.

    Raises InputError where there is no such file, or training cannot start with it.
    """
    if not name:
        use_cpu, mixed = without_engine(precision)
        return (
            f"{{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_GPU, use_cpu: {use_cpu}, num_machines: 1, "
            f'num_processes: {ranks}, machine_rank: 0, mixed_precision: "{mixed}", rdzv_backend: static, '
            "same_network: true}\n"
        )
    for file in (Path(name), shipped(f"launch/{name}.yaml"), shipped(f"launch/{name}")):
        if os.path.isfile(file):
            try:
                return _read_engine(file)
            except Exception as error:  # of many kinds
                reason = one_line(error, 200)
                raise InputError(f"--engine {file} is no configuration of Accelerate: {reason}") from None
    known = ", ".join(sorted(file.stem for file in shipped("launch").glob("*.yaml")))
    raise InputError(f"--engine {name} is no file and no name in launch/{': ' + known if known else ''}")


def _read_engine(file: Path) -> str:
    """The configuration in a file, as YAML. Raises what Accelerate raises, or ValueError for what it would only refuse
    in the ranks."""
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(file))
    for key, values in POSSIBLE.items():
        value = getattr(config, key)
        if str(getattr(value, "value", value)) not in values:
            raise ValueError(f"{key} is {value}: it must be one of {', '.join(values[:4])}")
    text = file.read_text()
    content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    deepspeed = content.get("deepspeed_config") or {}
    if str(stage := deepspeed.get("zero_stage", 0)) not in ("0", "1", "2", "3"):
        raise ValueError(f"deepspeed_config.zero_stage is {stage}: it must be 0, 1, 2 or 3")
    settings = deepspeed.get("deepspeed_config_file")
    if settings and settings != "none" and not os.path.isfile(str(settings)):
        raise ValueError(f"deepspeed_config_file {settings}: no such file")
    return yaml.safe_dump(content) if file.suffix == ".json" else text


def without_engine(precision: str) -> tuple[str, str]:
    """use_cpu and mixed_precision as in launch/gpus.yaml and launch/cpu.yaml, except that train.precision decides."""
    from pipeline.distributed.host import count_gpus

    return ("false", "no" if precision else "bf16") if count_gpus() else ("true", "no")


def require_gpus(wanted: int, processes: int, engine: str) -> None:
    """Raise InputError or Unavailable where this host has fewer GPUs than --gpus=`wanted`, or than its ranks need."""
    from pipeline.distributed.host import check_gpus, count_gpus

    check_gpus(f"--gpus {wanted}", wanted)
    config = yaml.safe_load(engine)
    on_gpus = count_gpus() or config.get("distributed_type") == "MULTI_GPU"  # DeepSpeed also runs on CPUs
    if on_gpus and not config.get("use_cpu"):
        check_gpus(f"{processes} ranks on GPUs are to start here (on CPUs: --engine cpu)", processes)
