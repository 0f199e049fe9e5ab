"""A network with buffers trains, stops, goes on and loads as one without: what is saved of them, and when."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from naign.checkpoint.writer import newest_checkpoint
from naign.config import Config
from naign.data.loader import Stream
from naign.model import networks
from naign.model.naign import NAIGN
from naign.model.prior import PriorConfig, build_prior
from naign.training.engines import build_engine
from naign.training.state import Position, snapshot
from tests.conftest import ROOT, SMALL, environment


@dataclass(kw_only=True, slots=True)
class NormedConfig(networks.NetworkConfig):
    name: str = "normed"


class Normed(nn.Module):
    """With running statistics, a counter, and a buffer that is computed and not saved."""

    def __init__(self, channels, size):
        super().__init__()
        self.register_buffer("ramp", torch.linspace(-1, 1, size), persistent=False)
        self.first, self.last = nn.Conv2d(channels + 1, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        ramp = self.ramp.expand(len(x), 1, *x.shape[2:])
        return self.last(self.norm(self.first(torch.cat([x, ramp], 1))).relu()).tanh()


def build(config, shape, *, recompute):
    return Normed(shape[0], shape[1])


ENTRY = {"normed": (NormedConfig, build)}
STATE = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline import train
from naign.model import networks
from tests.model.test_buffers import ENTRY
networks.NETWORKS |= ENTRY
train.main()
"""


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_its_model_loads(digits, tmp_path, monkeypatch):
    small = [option for option in SMALL if not option.startswith("--model")]
    options = [f"--data.path={digits}", "--model.name=normed", *small, "--train.ema=0.9", "--train.images=768"]
    options += ["--checkpoint.rounds=1", "--checkpoint.keep=0"]

    def train(run):
        command = [sys.executable, "-c", PROGRAM, *options, f"--run.path={run}"]
        done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    first, *others = sorted((tmp_path / "cut/checkpoints").iterdir())
    for folder in others:
        shutil.rmtree(folder)
    train("cut")
    whole, cut = (newest_checkpoint(tmp_path / run / "checkpoints") for run in ("whole", "cut"))
    assert whole.name == cut.name != first.name
    for file in ("model", "ema"):
        ours, theirs = (load_file(folder / f"{file}.safetensors") for folder in (whole, cut))
        assert {name for name in ours if name.startswith("norm.")} == {"norm.weight", "norm.bias", *STATE}
        assert "ramp" not in ours and ours["norm.num_batches_tracked"].dtype == torch.int64
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["norm.running_mean"], torch.zeros(8))  # also the average's: they are the run's

    monkeypatch.setitem(networks.NETWORKS, *ENTRY.popitem())
    state = torch.get_rng_state()
    model = NAIGN.from_pretrained(tmp_path / "whole", "cpu")
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random number
    assert torch.equal(model.network.ramp, torch.linspace(-1, 1, 8)) and model.sample(3).shape == (3, 1, 8, 8)
    model.save_pretrained(tmp_path / "exported")
    assert torch.equal(NAIGN.from_pretrained(tmp_path / "exported").sample(3), model.sample(3))


@pytest.fixture
def engine(digits):
    config = Config()
    config.data.path, config.train.ema = digits, 0.5
    with Stream(config.data, seed=0, round_size=config.match.round) as stream:
        yield config, stream, build_engine(config, Normed(1, 8), Accelerator(cpu=True))


def test_a_checkpoint_has_the_buffers_of_its_step(engine, tmp_path):
    config, stream, engine = engine
    engine.forward(torch.randn(4, 1, 8, 8))
    before = {name: value.clone() for name, value in engine.bare.named_buffers()}
    prior = build_prior(PriorConfig(name="gaussian"), stream.shape, engine.bare)
    copy, files = snapshot(config, stream, engine, Position(), prior)
    engine.forward(torch.randn(4, 1, 8, 8))  # training goes on while the files are written
    copy()
    files["model.safetensors"](Path(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in STATE)


def test_sampling_uses_the_running_statistics_and_leaves_them_alone(engine):
    _, _, engine = engine
    engine.forward(5 + torch.randn(4, 1, 8, 8))
    before = {name: value.clone() for name, value in engine.bare.named_buffers()}
    noise = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(engine.sample(noise)[:3], engine.sample(noise[:3]))
    assert engine.bare.training and all(torch.equal(value, before[name]) for name, value in engine.bare.named_buffers())
