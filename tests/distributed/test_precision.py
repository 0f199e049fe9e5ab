"""train.precision=auto: bf16 where it is fast, unless the launcher says otherwise."""

import pytest
import torch

from pipeline.distributed import ranks
from tests.conftest import SMALL, Program

ABLE = [
    ({"avx512_bf16": True}, "bf16"),
    ({"amx_bf16": True}, "bf16"),
    ({"avx2": True, "amx_bf16": False}, "fp32"),
    ({}, "fp32"),
]


@pytest.mark.parametrize(("able", "expected"), ABLE)
def test_processors_that_multiply_bf16_are_known(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert ranks.choose_precision(on_cpu=True) == expected


def test_a_run_takes_what_the_processor_has(train: Program, digits: str) -> None:
    done = train(*SMALL, f"--data.path={digits}", "--train.images=512", "--train.precision=auto")
    assert done.returncode == 0, done.stderr
    fast = ranks.choose_precision(not torch.cuda.is_available()) == "bf16"
    assert ("bf16" if fast else "float32") in done.stdout + done.stderr
