"""A network with buffers trains, stops, goes on and loads as one without: what is saved of them, and when."""

import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from naign.checkpoint.writer import newest_checkpoint
from naign.config import Config
from naign.data.loader import Stream
from naign.model import networks
from naign.model.bank import Bank
from naign.model.naign import NAIGN
from naign.model.prior import LatentsConfig, Prior, PriorConfig, build_latents
from naign.training.engines import build_engine
from naign.training.state import State, snapshot
from tests.conftest import ROOT, SMALL
from tests.programs import execute, succeeded


@dataclass(kw_only=True, slots=True)
class NormedConfig(networks.NetworkConfig):
    name: str = "normed"


class Normed(nn.Module):
    """With running statistics, a counter, and a buffer that is computed and not saved."""

    def __init__(self, channels, size):
        super().__init__()
        self.register_buffer("ramp", torch.linspace(-1, 1, size), persistent=False)
        self.first = nn.Conv2d(channels + 1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x):
        ramp = self.ramp.expand(len(x), 1, *x.shape[2:])
        maps = self.first(torch.cat([x, ramp], 1))
        return self.last(self.norm(maps).relu()).tanh()


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


@pytest.fixture
def train(digits, tmp_path):
    """Trains a network of this kind for three rounds, each with a checkpoint."""

    def train(run):
        options = [f"--data.path={digits}", "--model.name=normed", "--train.ema=0.9", "--train.images=768"]
        options += ["--checkpoint.rounds=1", "--checkpoint.keep=0", f"--run.path={run}"]
        options += [option for option in SMALL if not option.startswith("--model")]
        succeeded(execute([sys.executable, "-c", PROGRAM, *options], tmp_path))
        return tmp_path / run

    return train


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_its_model_loads(train, tmp_path, monkeypatch):
    whole = train("whole")
    shutil.copytree(whole, tmp_path / "cut")
    first, *others = sorted((tmp_path / "cut/checkpoints").iterdir())
    for folder in others:
        shutil.rmtree(folder)
    cut = newest_checkpoint(train("cut") / "checkpoints")
    newest = newest_checkpoint(whole / "checkpoints")
    assert newest.name == cut.name != first.name
    for file in ("model.safetensors", "ema.safetensors"):
        ours = load_file(newest / file)
        theirs = load_file(cut / file)
        assert {name for name in ours if name.startswith("norm.")} == {"norm.weight", "norm.bias", *STATE}
        assert "ramp" not in ours
        assert ours["norm.num_batches_tracked"].dtype == torch.int64
        for name in ours:
            assert torch.equal(ours[name], theirs[name])
        assert ours["norm.running_mean"].any()  # also the average's: they are the run's
    monkeypatch.setitem(networks.NETWORKS, *ENTRY.popitem())
    state = torch.get_rng_state()
    model = NAIGN.from_pretrained(whole)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random number
    assert torch.equal(model.network.ramp, torch.linspace(-1, 1, 8))
    model.save_pretrained(tmp_path / "exported")
    assert torch.equal(NAIGN.from_pretrained(tmp_path / "exported").sample(3), model.sample(3))


@pytest.fixture
def config(digits):
    config = Config()
    config.data.path = digits
    config.train.ema = 0.5
    return config


def copies(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def test_a_checkpoint_has_the_buffers_of_its_step(config, tmp_path):
    engine = build_engine(config, Normed(1, 8), Accelerator(cpu=True))
    with Stream(config.data, seed=0, round_size=config.match.round) as stream:
        engine.forward(torch.randn(4, 1, 8, 8))
        before = copies(engine.bare)
        latents = build_latents(LatentsConfig(name="gaussian"), stream.shape)
        prior = Prior(PriorConfig(), stream.shape)
        taken = snapshot(
            config,
            stream,
            engine,
            State(),
            latents,
            prior,
            Bank(),
        )
    engine.forward(torch.randn(4, 1, 8, 8))  # training goes on while the files are written
    taken.files["model.safetensors"](tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    for name in STATE:
        assert torch.equal(saved[name], before[name])


def test_sampling_uses_the_running_statistics_and_leaves_them_alone(config):
    engine = build_engine(config, Normed(1, 8), Accelerator(cpu=True))
    engine.forward(5 + torch.randn(4, 1, 8, 8))
    before = copies(engine.bare)
    noise = torch.randn(6, 1, 8, 8)
    assert_close(engine.sample(noise)[:3], engine.sample(noise[:3]))
    assert engine.bare.training
    for name, value in engine.bare.named_buffers():
        assert torch.equal(value, before[name])
