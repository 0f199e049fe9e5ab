"""A run that begins from the weights of another one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.writer import newest_checkpoint
from pipeline.model.naign import NAIGN
from tests.conftest import SMALL

CODES = ["--prior.name=flow", "--prior.width=32", "--prior.passes=8", "--prior.batch=64"]
CODES += ["--prior.begin=0"]


def first_loss(run: Path) -> dict[str, float]:
    line: dict[str, float] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return line


@pytest.mark.slow
def test_it_begins_where_the_other_ended_and_need_not_have_it_to_resume(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, *CODES]
    assert train("--run.path=one", *options, "--train.images=4096").returncode == 0
    (tmp_path / "one/metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    options += ["--run.path=two", "--model.init=one", "--train.images=1024", "--train.lr=1e-5", "--prior.steps=3"]
    done = train(*options)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[7])  # of those in which f was trained
    begin = first_loss(tmp_path / "two")
    assert begin["loss/reconstruction"] < 1.1 * last["loss/reconstruction"]

    (tmp_path / "one").rename(tmp_path / "gone")
    newest = newest_checkpoint(tmp_path / "two/checkpoints")
    assert newest and NAIGN.from_pretrained(newest).metadata["model"]["init"] == ""
    assert NAIGN.from_pretrained(newest).prior.config.steps == 3
    assert train(*options).returncode == 0  # nothing is left to do, and the other run is not looked for

    # Another size of code: what fits is taken.
    options[-4:] = ["--model.init=gone", "--run.path=three", "--train.images=256", "--model.code=9", "--train.lr=1e-9"]
    options += ["--train.lr_end=1e-9", "--train.warmup=0", "--prior.lr=1e-9"]
    done = train(*options)
    assert done.returncode == 0, done.stderr
    assert "not decoder.1.weight" in done.stderr
    old, new = (newest_checkpoint(tmp_path / name / "checkpoints") for name in ("gone", "three"))
    assert old and new
    old, new = load_file(old / "model.safetensors"), load_file(new / "model.safetensors")
    torch.testing.assert_close(new["encoder.0.weight"], old["encoder.0.weight"], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["mlp", "nothing", "a pickle"])
def test_what_it_cannot_begin_from_is_refused_before_anything_is_written(train, digits, tmp_path, given):
    if given == "a pickle":
        torch.save({"encoder.0.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    if given == "mlp":
        points = [option for option in SMALL if not option.startswith("--model.code")]
        options = ["--model.name=mlp", "--prior.name=gaussian"]
        assert train(f"--data.path={digits}", *points, *options, "--run.path=mlp", "--train.images=256").returncode == 0
    place = "model.safetensors" if given == "a pickle" else given
    done = train(f"--data.path={digits}", *SMALL, f"--model.init={place}", "--run.path=run")
    assert done.returncode == 2
    said = {"mlp": "model.name=mlp", "nothing": "nothing", "a pickle": "no readable safetensors file"}[given]
    assert said in done.stderr and not (tmp_path / "run").exists()
