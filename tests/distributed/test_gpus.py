"""GPUs that a run cannot have are told in a sentence before anything is waited for. The answers here are torch's."""

import os
from unittest.mock import Mock

import pytest
import torch

from naign.cluster import launch
from naign.distributed import connect, host
from naign.distributed.connect import build_accelerator
from naign.distributed.host import check_gpus
from naign.errors import BAD_INPUT, FAILED, InputError, Unavailable

NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
UNKNOWN = "CUDA unknown error - this may be due to an incorrectly set up environment"
HIDDEN = "No CUDA GPUs are available"


@pytest.fixture
def machine(monkeypatch):
    """Sets what torch answers: whether it is a CUDA build, its GPUs, what it says on the first use, bfloat16."""

    monkeypatch.setattr(launch, "on_signals", lambda *_: None)  # they are this process's

    def answer(*, built=True, count=0, said="", bf16=True):
        def init():
            if said:
                raise RuntimeError(said)

        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if built else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        # By NVML, which knows nothing of this torch: cards that are there, not those that can be used.
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count or 8)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Tesla T4")
        monkeypatch.setattr(connect, "why_unfit", lambda index: "")

    return answer


@pytest.mark.parametrize(
    ("torch_says", "kind", "said"),
    [
        ({"built": False}, InputError, "was built without CUDA: install a CUDA build"),
        ({"said": NO_DRIVER}, InputError, "Found no NVIDIA driver .* installed a driver .*: see nvidia-smi"),
        (
            {"said": OLD_DRIVER},
            InputError,
            r"too old \(found .* \(torch \S+ is for CUDA 13.0\): see nvidia-smi",
        ),
        ({"said": HIDDEN}, Unavailable, "No CUDA GPUs are available .* nvidia.com/gpu"),
        ({"count": 7}, Unavailable, "8 GPUs are needed on this host, torch can use 7: a GPU may have failed; else ask"),
    ],
)
def test_gpus_that_are_missing(torch_says, kind, said, machine):
    machine(**torch_says)
    with pytest.raises(kind, match=said) as caught:
        check_gpus("--gpus 8", 8)
    assert "\n" not in str(caught.value)
    machine(count=8)
    check_gpus("--gpus 8", 8)


@pytest.mark.parametrize(
    ("torch_says", "code"),
    [
        ({"said": NO_DRIVER}, BAD_INPUT),
        ({"said": UNKNOWN}, FAILED),
    ],
)
def test_gpus_are_looked_at_before_the_bucket(
    torch_says,
    code,
    machine,
    monkeypatch,
    capsys,
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    machine(**torch_says)
    assert launch.main(["--gpus=2", "--run.remote=s3://bucket/run"]) == code
    said = capsys.readouterr().err
    assert "--gpus 2: 2 GPUs are needed" in said and "bucket" not in said and len(said.splitlines()) == 1


def test_a_node_that_lost_a_gpu_of_its_job_is_no_bad_input(machine, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ |= {
        "SLURM_PROCID": "0",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_GPUS_ON_NODE": "8",
        "NAIGN_HEAD": "localhost",
    }
    machine(count=7)
    assert launch.main([]) == FAILED
    assert "8 GPUs are needed on this host, torch can use 7" in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused(machine, monkeypatch, capsys):
    machine(count=2)
    assert launch.main(["--processes=4", "--run.remote=s3://bucket/run"]) == FAILED
    assert "4 ranks on GPUs are to start here (on CPUs: --engine cpu): 4 GPUs are needed" in capsys.readouterr().err
    machine(built=False)
    assert launch.main(["--engine=gpus", "--processes=2", "--run.remote=s3://bucket/run"]) == BAD_INPUT
    assert "2 GPUs are needed on this host, torch can use 0: torch" in capsys.readouterr().err
    machine(count=2)
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match="4 ranks were started here: 4 GPUs are needed on this host, torch can use 2"):
        build_accelerator()
    machine(said=OLD_DRIVER)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises(InputError, match="use_cpu: false .* NVIDIA driver on your system is too old"):
        build_accelerator()


def test_bf16_on_a_card_without_is_refused(machine):
    machine(count=1, bf16=False)
    with pytest.raises(
        InputError, match="train.precision is bf16, which Tesla T4 only emulates: use --train.precision"
    ):
        build_accelerator(precision="bf16")


def test_a_card_that_torch_has_no_code_for(machine, monkeypatch):
    machine(count=1)
    monkeypatch.setattr(connect, "why_unfit", host.why_unfit)
    said = "CUDA error: no kernel image is available for execution on the device\nCompile with ..."
    monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError(said)))
    with pytest.raises(InputError, match="^GPU 0, Tesla T4, cannot be used by torch .*no kernel image.*: use another"):
        build_accelerator()
