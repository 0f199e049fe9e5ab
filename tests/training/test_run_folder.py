"""A run's folder belongs to one configuration and one process, and a checkpoint of it is taken whole or refused."""

import errno
import importlib.metadata
import os
import runpy
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from threading import Timer
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file, save

from naign.checkpoint.writer import MANIFEST, Writer, newest_checkpoint
from naign.config import Config
from naign.data.loader import Stream
from naign.errors import Gone, InputError, Unavailable
from naign.model.bank import Bank
from naign.model.networks import build_network
from naign.model.prior import LatentsConfig, Prior, PriorConfig, build_latents
from naign.training import run_folder
from naign.training.engines import build_engine
from naign.training.run_folder import claim, find_claimed
from naign.training.state import State, restore, restore_weights, snapshot
from tests.checkpoint.written import write_checkpoint
from tests.e2e.runs import same

LATENTS = build_latents(LatentsConfig(name="gaussian"), (1, 8, 8))
PRIOR = Prior(PriorConfig(), (1, 8, 8))
POSITION = State(
    round=3,
    images_seen=300,
    step=30,
    seconds=1.5,
    skipped=2,
)


def make(folder, digits, seed=0):
    """A configuration, its stream and its engine after one step."""
    config = Config(latents=LatentsConfig(name="gaussian"), prior=PriorConfig())
    config.run.path = str(folder)
    config.data.path = digits
    config.model.width = 8
    config.model.code = 8
    config.train.ema = 0.5
    with Stream(config.data, seed=0, round_size=config.match.round) as stream:
        torch.manual_seed(seed)
        engine = build_engine(config, build_network(config.model, stream.shape), Accelerator(cpu=True))
        with engine.micro_batch():
            engine.backward(engine.forward(torch.randn(4, *stream.shape)).square().sum())
        assert engine.step() > 0
        return config, stream, engine


def newest_of(config):
    return newest_checkpoint(Path(config.run.path) / "checkpoints")


def write(config, stream, engine, position=POSITION):
    writer = Writer(Path(config.run.path), keep=2)
    taken = snapshot(
        config,
        stream,
        engine,
        position,
        LATENTS,
        PRIOR,
        Bank(),
    )
    writer.start(taken.name, taken.files)
    assert writer.join()


@pytest.fixture
def run(tmp_path, digits):
    """A run with one checkpoint."""
    config, stream, engine = make(tmp_path / "run", digits)
    _, _, lock = claim(config)
    write(config, stream, engine)
    lock.release()
    return config, stream, engine


def resume(checkpoint, engine):
    restore_weights(checkpoint, engine.bare)
    return restore(checkpoint, engine)


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
    config, _, engine = run
    newest, _, lock = claim(config)
    _, _, other = make(config.run.path, digits, seed=1)
    assert resume(newest, other) == POSITION
    for (name, mine), (_, theirs) in zip(engine.states(), other.states(), strict=True):
        kept = {"weight", "exp_avg"} if mine["weight"].ndim > 1 else {"weight", "exp_avg", "exp_avg_sq"}
        assert mine.keys() == kept, name
        assert same(mine, theirs), name
    assert engine.steps == other.steps == 1
    assert same(engine.ema.state_dict(), other.ema.state_dict())
    lock.release()


def test_state_that_another_world_size_left_is_passed_over(run):
    config, _, engine = run
    newest = newest_of(config)
    shutil.copy(newest / STATE, newest / "state/rank-00001-of-00004.safetensors")
    assert resume(newest, engine) == POSITION


def test_a_folder_in_use_is_refused(run, monkeypatch):
    config, _, _ = run
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    with FileLock(f"{config.run.path}/.lock"), pytest.raises(InputError, match="in use by another process"):
        claim(config)


def test_a_listing_that_holds_the_lock_for_an_instant_stops_no_start(run):
    config, _, _ = run
    lock = FileLock(f"{config.run.path}/.lock", thread_local=False)
    lock.acquire()
    Timer(0.3, lock.release).start()
    claim(config)[2].release()


def test_a_model_that_cannot_be_built_here_is_not_called_damaged(run, monkeypatch):
    config, _, _ = run

    def build(*_):
        raise ValueError("there is no network 'theirs': install the package that has it")

    monkeypatch.setattr("naign.model.naign.build_network", build)
    with pytest.raises(InputError, match="install the package that has it") as refused:
        claim(config)
    assert "remove that folder" not in str(refused.value)


def test_another_configuration_is_refused_even_without_config_yaml(run):
    config, _, _ = run
    config.model.width = 16
    with pytest.raises(InputError, match="model.width: 8 there, 16 now"):
        claim(config)


def test_what_only_rounds_otherwise_may_change(run):
    config, _, _ = run
    config.train.accumulate = 2
    config.train.precision = "bf16"
    config.checkpoint.keep = 5
    newest, _, lock = claim(config)
    assert newest
    lock.release()


def test_a_copy_beside_the_checkpoints_is_not_one_of_them(run, tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-00000030").rename(checkpoints / "step-old.bak")
    assert newest_checkpoint(checkpoints) is None


def test_where_all_are_damaged_the_newest_is_named(run, tmp_path):
    config, stream, engine = run
    write(config, stream, engine, replace(POSITION, step=40))
    for file in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"x")
    with pytest.raises(InputError, match="step-00000040 and all before it are damaged"):
        claim(config)


def test_what_cannot_hold_checkpoints_is_refused_before_training(tmp_path, digits):
    config, _, _ = make(tmp_path / "run", digits)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("")
    for path in (config.run.path, "a\0b", "\ud800"):
        config.run.path = path
        with pytest.raises(InputError, match="cannot be written"):
            claim(config)


def test_a_checkpoint_without_a_manifest_is_told_of(run, tmp_path, caplog):
    config, _, _ = run
    (tmp_path / "run/checkpoints/step-00000030" / MANIFEST).unlink()
    newest, _, lock = claim(config)
    lock.release()
    assert newest is None and "step-00000030 has no manifest" in caplog.text


def test_an_optimizer_s_state_that_is_not_finite_is_refused(run, tmp_path, digits):
    checkpoint = tmp_path / "run/checkpoints/step-00000030"
    state = {name: torch.full_like(value, torch.nan) for name, value in load_file(checkpoint / STATE).items()}
    rewrite(checkpoint, STATE, save(state))
    _, _, engine = make(tmp_path / "run", digits)
    with pytest.raises(InputError, match="not finite"):
        resume(checkpoint, engine)


STATE = "state/rank-00000-of-00001.safetensors"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (STATE, b"cos\nsystem\n(S'touch executed'\ntR."),
        (STATE, save({"other": torch.zeros(0)})),
        ("trainer.json", b"{}"),
        ("trainer.json", b'{"round": "x", "images_seen": 1, "step": 1, "seconds": 0}'),
        ("model.safetensors", b"no model"),
        ("ema.safetensors", b"no model"),
    ],
)
def test_a_checkpoint_that_is_not_one_is_refused_and_runs_no_code(name, content, run, tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run/checkpoints/step-00000030"
    rewrite(checkpoint, name, content)
    assert newest_checkpoint(checkpoint.parent) == checkpoint
    _, _, engine = make(tmp_path / "run", digits)
    with pytest.raises(InputError, match="step-00000030"):
        resume(checkpoint, engine)
    assert not (tmp_path / "executed").exists()


FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    MemoryError("no memory"),
    OSError(errno.EIO, "Input/output error"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_device_that_fails_is_no_damage_of_the_checkpoint(fault, run, monkeypatch):
    config, _, engine = run
    checkpoint = newest_of(config)

    def fail(*_, **__):
        raise fault

    for owner, name in (
        (engine.bare, "load_state_dict"),
        (engine, "restore"),
        (engine.ema, "load_state_dict"),
    ):
        with monkeypatch.context() as patched, pytest.raises(type(fault)) as caught:
            patched.setattr(owner, name, fail)
            resume(checkpoint, engine)
        assert caught.value is fault
    with monkeypatch.context() as patched, pytest.raises(type(fault)) as caught:
        patched.setattr(run_folder, "safe_open", fail)
        resume(checkpoint, engine)
    assert caught.value is fault


@pytest.mark.parametrize("name", [STATE, "model.safetensors", "ema.safetensors", "trainer.json"])
def test_a_disk_that_fails_is_no_damage_of_the_checkpoint(name, run):
    config, _, engine = run
    checkpoint = newest_of(config)
    file = checkpoint / name
    file.unlink()
    file.symlink_to(file)  # opening it fails, and not since it is missing
    with pytest.raises(OSError) as caught:
        resume(checkpoint, engine)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize(("number", "raised"), [(errno.EIO, Unavailable), (errno.ENOTDIR, InputError)])
def test_a_disk_that_fails_for_a_while_is_not_the_users_mistake(number, raised, run, monkeypatch):
    config, *_ = run
    with monkeypatch.context() as patched, pytest.raises(raised):
        patched.setattr(Path, "mkdir", Mock(side_effect=OSError(number, os.strerror(number))))
        claim(config)
    claim(config)[2].release()


def test_state_of_another_architecture_is_refused(run, tmp_path, digits):
    checkpoint = tmp_path / "run/checkpoints/step-00000030"
    state = load_file(checkpoint / STATE)
    rewrite(checkpoint, STATE, save({key: value.flatten()[:1].clone() for key, value in state.items()}))
    _, _, engine = make(tmp_path / "run", digits)
    with pytest.raises(InputError, match="encoder.0.weight has another shape than"):
        resume(checkpoint, engine)


def test_a_run_goes_on_with_more_images_only_if_told_so(run):
    config, *_ = run
    lock = claim(config)[2]
    lock.release()
    more = deepcopy(config)
    more.train.images *= 2
    with pytest.raises(InputError, match=r"train.images: .* there, .* now(.|\n)*--resume=changed"):
        claim(more)
    more.resume = "changed"
    newest, _, lock = claim(more)
    lock.release()
    assert newest is not None
    more.model.width *= 2
    with pytest.raises(InputError, match=r"model.width(.|\n)*take these settings back to go on with that run$"):
        claim(more)


def test_a_checkpoint_that_is_lost_after_rank_0_has_claimed_it_is_worth_another_start(bucket, tmp_path):
    config = Config()
    config.run.path = str(tmp_path / "run")
    config.run.remote = f"{bucket}/run"
    with pytest.raises(Gone, match="checkpoints/step-00000001/manifest.json: no such object"):
        find_claimed(config, "step-00000001", token="of rank 0")


def test_a_checkout_that_was_never_installed_trains(monkeypatch):
    versions = importlib.metadata.version

    def version(name):
        if name == "naign":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert runpy.run_module("naign.training.state")["VERSIONS"]["naign"] == "0+checkout"


def test_a_checkpoint_whose_other_files_are_in_the_bucket_raises_no_alarm(tmp_path, monkeypatch, caplog):
    config = Config()
    name = "step-00000002"
    config.run.path = str(tmp_path)
    config.run.remote = "s3://bucket/run"
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / name / MANIFEST).write_text("{}")
    monkeypatch.setattr(run_folder, "recorded_at", lambda _: {})
    monkeypatch.setattr(run_folder, "_compare_checkpoint", lambda *_: None)
    for sent, said in (
        ([name], "lacks files of other hosts, or is damaged: the copy in the bucket is used"),
        ([], "is damaged or incomplete: passed over"),
    ):
        stand_in = Mock(newest_first=lambda _, sent=sent: sent, download=lambda *_: tmp_path / "copy")
        monkeypatch.setattr(run_folder, "bucket", stand_in)
        assert run_folder.find_newest(config) == (tmp_path / "copy" if sent else None)
        assert f"{name} {said}" in caplog.text
