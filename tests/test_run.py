"""A run's folder belongs to one configuration and one process, and a checkpoint of it is taken whole or refused."""

import json
import pickle

import pytest
import torch
from filelock import FileLock

from pipeline.config import Config
from pipeline.data.stream import Stream
from pipeline.errors import InputError
from pipeline.model.networks import build_network
from pipeline.run import Learned, Position, claim, restore, save
from pipeline.runtime.checkpoint import MANIFEST, newest_checkpoint, write_checkpoint


def make(folder, digits):
    """A configuration, its network and optimizer after one step."""
    config = Config()
    config.run.path, config.data.path = str(folder), digits
    config.model.width, config.model.code = 8, 8
    stream = Stream(config.data, seed=0, round_size=config.match.round)
    torch.manual_seed(0)
    network = build_network(config.model, stream.shape)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(4, *stream.shape)).sum().backward()
    optimizer.step()
    return config, stream, Learned(network=network, optimizer=optimizer, ema=None)


@pytest.fixture
def run(tmp_path, digits):
    """A run with one checkpoint."""
    config, stream, learned = make(tmp_path / "run", digits)
    _, lock = claim(config)
    save(config, stream, learned, Position(round=3, images_seen=300, step=30, seconds=1.5), world=1)
    lock.release()
    return config, learned


def rewrite(checkpoint, name, content):
    """Replace one file of a checkpoint and make the manifest agree, as somebody with bad intent would."""
    files = {path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}

    def fill(folder):
        for path, data in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            if path.name != MANIFEST:
                (folder / path).write_bytes(content if str(path) == name else data)

    write_checkpoint(checkpoint, fill)


def test_what_is_saved_comes_back(run, digits):
    config, learned = run
    newest, lock = claim(config)
    _, _, other = make(config.run.path, digits)
    torch.nn.init.zeros_(other.network.encoder[0].weight)
    position = restore(newest, other)
    assert position == Position(round=3, images_seen=300, step=30, seconds=1.5)
    for name, value in learned.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[name], value)
    lock.release()


def test_a_folder_in_use_is_refused(run):
    config, _ = run
    with FileLock(f"{config.run.path}/.lock"), pytest.raises(InputError, match="in use by another process"):
        claim(config)


def test_another_configuration_is_refused_even_without_config_yaml(run, tmp_path):
    config, _ = run
    (tmp_path / "run/config.yaml").unlink()
    config.train.lr = 0.5
    with pytest.raises(InputError, match="train.lr: 0.002 there, 0.5 now"):
        claim(config)


def test_a_copy_beside_the_checkpoints_is_not_one_of_them(run, tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-00000030").rename(checkpoints / "step-old.bak")
    assert newest_checkpoint(checkpoints) is None


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state/optimizer.pt", pickle.dumps(Evil())),
        ("state/optimizer.pt", b""),
        ("trainer.json", b"{}"),
        ("trainer.json", json.dumps({"round": "x", "images_seen": 1, "step": 1, "seconds": 0}).encode()),
        ("model.safetensors", b"no model"),
    ],
)
def test_a_checkpoint_that_is_not_one_is_refused_and_runs_no_code(name, content, run, tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run/checkpoints/step-00000030"
    rewrite(checkpoint, name, content)
    assert newest_checkpoint(checkpoint.parent) == checkpoint
    _, _, learned = make(tmp_path / "run", digits)
    with pytest.raises(InputError, match="step-00000030"):
        restore(checkpoint, learned)
    assert not (tmp_path / "executed").exists()
