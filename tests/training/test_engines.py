"""What the launcher's engine cannot do is refused before anything is written."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from naign.config import parse
from naign.distributed import connect, zero
from naign.distributed.host import set_threads
from naign.distributed.optimizers import OPTIMIZERS
from naign.errors import InputError
from naign.training.engines import check_engine
from tests.conftest import SMALL

OPTIONS = ["--data.path=x", *(option for option in SMALL if not option.startswith("--objective"))]


def accelerator(stage=None, *, ranks=1, precision="no", **configured):
    """An Accelerator, with DeepSpeed's configuration if it has a stage."""
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=configured)
    kind = DistributedType.NO if stage is None else DistributedType.DEEPSPEED
    state = SimpleNamespace(deepspeed_plugin=plugin)
    device = torch.device("cpu")
    return SimpleNamespace(
        num_processes=ranks, distributed_type=kind, mixed_precision=precision, state=state, device=device
    )


@pytest.fixture(autouse=True)
def other_optimizer(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "other", OPTIMIZERS["adamw"])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"stage": 3}, ["--objective.name=ign"], "objective.name=ign evaluates a frozen copy"),
        ({"stage": 2, "precision": "bf16"}, ["--objective.name=ign"], "ZeRO 1 to 2 in float32"),
        ({"stage": 0}, [], "use ZeRO 1 to 3, or DDP"),
        ({"stage": 2}, ["--train.optimizer=other"], "train.optimizer=other does not go with DeepSpeed"),
        ({"stage": 2}, ["--train.compile"], "train.compile=True does not go with DeepSpeed"),
        ({"stage": 2, "bf16": {"enabled": True}}, [], "bf16.enabled: True, but the run's precision is fp32"),
        ({"stage": 2, "optimizer": {}}, [], "has a section 'optimizer'"),
        ({"ranks": 2}, ["--train.accumulate=3"], "2 ranks x 3 micro-batches"),
    ],
)
def test_what_an_engine_cannot_do(given, options, message):
    config = parse([*OPTIONS, *options])
    with pytest.raises(InputError, match=message):
        check_engine(config, accelerator(**given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective.name=ign"], "objective.name=ign does not go with FSDP"),
        (["--train.optimizer=other"], "train.optimizer=other does not go with FSDP"),
        (["--train.compile"], "train.compile=True does not go with FSDP"),
    ],
)
def test_what_fsdp_cannot_do(options, message, monkeypatch):
    check_engine(parse([*OPTIONS, *options]), accelerator())
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_engine(parse(OPTIONS), accelerator())
    with pytest.raises(InputError, match=message):
        check_engine(parse([*OPTIONS, *options]), accelerator())


def test_compiling_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="train.compile needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        check_engine(parse([*OPTIONS, "--train.compile"]), accelerator())


def test_fsdp_1_is_refused_and_a_variable_of_no_launcher_is_ignored(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert connect.build_accelerator().num_processes == 1 and "FSDP_VERSION" not in os.environ
    for name, value in (("FSDP_VERSION", "1"), ("ACCELERATE_USE_FSDP", "true"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="set fsdp_version: 2"):
        connect.build_accelerator()


def test_stray_variables_of_accelerate_are_ignored_and_a_world_of_no_number_is_named(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("OMP_NUM_THREADS", None)
    for name in ("DYNAMO_BACKEND", "TORCH_DEVICE", "DEBUG_MODE", "GRADIENT_ACCUMULATION_STEPS"):
        os.environ[f"ACCELERATE_{name}"] = "junk"
    AcceleratorState._reset_state(True)
    assert connect.build_accelerator(accumulate=2).gradient_accumulation_steps == 2
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setattr(os, "environ", os.environ | {name: "junk"})
        for use in (connect.build_accelerator, lambda: set_threads(0)):
            with pytest.raises(InputError, match=f"{name} is 'junk', which is not a number: unset it"):
                use()
        del os.environ[name]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ranks": 4},
        {"stage": 3},
        {"stage": 2, "precision": "bf16"},
    ],
)
def test_what_an_engine_can_do(given):
    check_engine(parse(OPTIONS), accelerator(**given))


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4, but train.accumulate makes it 2"),
        ({"train_batch_size": 7}, "train_batch_size: 7, but train.batch makes it 16"),
    ],
)
def test_a_deepspeed_configuration_that_contradicts_the_run(configured, message):
    with pytest.raises(InputError, match=message):
        zero._configure(accelerator(2, ranks=2, **configured), micro=4, accumulate=2, clip=1.0)


def test_fp16_of_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="says mixed_precision: fp16"):
        connect._mixed_precision("", on_cpu=False, deepspeed=False)
