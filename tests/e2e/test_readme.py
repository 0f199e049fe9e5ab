"""The README's steps, on the digits: pack, train, evaluate, then every command that uses a model."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from naign.cli.main import main
from naign.data.scale import scaled
from naign.model.naign import NAIGN
from tests.conftest import ROOT
from tests.e2e.runs import metrics_of
from tests.programs import succeeded


@pytest.mark.slow
def test_the_steps_of_the_readme(naign, train, tmp_path):
    def run(line):
        return succeeded(naign(line)).stdout

    assert "1438 train" in run("pack digits --to data/digits")
    assert "already there" in run("pack digits --to data/digits")
    assert "sound" in run("verify data/digits")

    options = ["--config", str(ROOT / "configs/digits.yaml"), "--train.images=4000", "--train.threads=1"]
    succeeded(train(*options, launcher=True))
    folder = tmp_path / "runs/digits"
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "samples", "checkpoints"} <= set(os.listdir(folder))

    assert "report.html" in run("evaluate runs/digits --samples 300")
    metrics = metrics_of(folder)
    assert metrics["encoder"] == "digits-cnn64"
    assert len(metrics["modes"]) == 10
    assert metrics["restoration"].keys() == {"blur", "noise", "salt_pepper", "rows"}
    assert {"fd", "coverage", "idempotence", "reconstruction", "seed", "images_seen", "seconds"} <= metrics.keys()

    run("sample runs/digits --n 9 --to grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0
    run("sample runs/digits --n 3 --to each --seed 7 --times 2")
    images = sorted((tmp_path / "each").iterdir())
    assert len(images) == 3
    run("restore runs/digits each --to repaired")
    assert Image.open(tmp_path / "repaired" / images[0].name).size == (8, 8)
    rows = list(csv.DictReader(run("score runs/digits each --times 2").splitlines()))
    model = NAIGN.from_pretrained(folder)
    for row, image in zip(rows, images, strict=True):
        assert Path(row["file"]).name == image.name
        pixels = torch.from_numpy(np.array(Image.open(image).convert("L")))
        energy = model.energy(scaled(pixels[None, None]), times=2)
        assert float(row["energy"]) == pytest.approx(float(energy), rel=1e-4)

    run("export runs/digits --to model")
    assert torch.equal(NAIGN.from_pretrained(tmp_path / "model").sample(5), model.sample(5))
    assert "ready" in run("doctor")


@pytest.mark.slow
def test_points_train_and_evaluate(naign, train, tmp_path):
    def run(line):
        succeeded(naign(line))

    run("pack toy2d:gaussians --to data/toy2d")
    config = str(ROOT / "configs/toy2d.yaml")
    succeeded(train("--config", config, "--train.images=30000", "--match.round=1024", "--train.threads=1"))
    run("evaluate runs/toy2d --samples 1000")
    assert metrics_of(tmp_path / "runs/toy2d")["coverage"]["recall"] > 0.5
    run("sample runs/toy2d --n 10 --to points.csv")
    assert len(np.loadtxt(tmp_path / "points.csv", delimiter=",")) == 10


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["pack", "mnits", "--to", "x"], "choose one of mnist"),
        (["pack", "digits"], "--to"),
        (["evaluate", "nowhere"], "no run or model at 'nowhere'"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_mistake_ends_with_code_2(options, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["naign", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert part in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
