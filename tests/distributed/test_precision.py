"""What depends on the machine: the precision that train.precision=auto takes, and which AdamW DeepSpeed can compile."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils import cpp_extension

from naign.distributed import connect, zero


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"amx_bf16": True}, "bf16"),
        ({"avx2": True, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True, "amx_bf16": False}, "fp32"),  # Intel's, with AMX hidden by a virtual machine
        ({"avx512_bf16": True, "sse4a": True}, "bf16"),  # AMD's
        ({}, "fp32"),
    ],
)
def test_processors_that_multiply_bf16_are_known(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert connect.choose_precision(on_cpu=True) == expected


def test_auto_takes_what_the_processor_has():
    AcceleratorState._reset_state(reset_partial_state=True)
    fast = connect.choose_precision(not torch.cuda.is_available()) == "bf16"
    assert connect.build_accelerator(precision="auto").mixed_precision == ("bf16" if fast else "no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("cuda", "compiler", "home", "forced"),
    [(True, "/usr/bin/g++", "/usr/local/cuda", None), (True, None, "/usr/local/cuda", False),
     (True, "/usr/bin/g++", None, False), (False, "/usr/bin/g++", None, False)],
)  # fmt: skip
def test_deepspeeds_own_adamw_is_asked_for_only_where_it_can_be_compiled(
    cuda,
    compiler,
    home,
    forced,
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(shutil, "which", lambda _: compiler)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    config = {}
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2)
    zero._configure(accelerator, micro=4, accumulate=1, clip=1.0)
    assert config.get("zero_force_ds_cpu_optimizer") is forced and config["train_batch_size"] == 8
