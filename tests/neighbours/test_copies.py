"""Copies of training images among samples: all that are planted, and in the report of an evaluation."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from naign.cli.main import main
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError
from naign.evaluate.report import COPIES, with_copies
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, PointConfig
from naign.neighbours import CopiesOptions
from naign.neighbours.copies import copies, judge
from naign.storage.store import open_store
from tests.neighbours.planted import SHAPE, image, plant, small_blocks

SAMPLES = 300
COPIED = {7: (40, False), 8: (41, True), 290: (640, False)}
"""Samples that are copies: of which training image, mirrored or not."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plant(str(tmp_path_factory.mktemp("planted")))


class Copier(nn.Module):
    """Noise, but for the samples of COPIED."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(len(COPIED), *SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        made = x.clone()
        for latent, (number, mirrored) in zip(self.latents, COPIED.values(), strict=True):
            pixels = torch.from_numpy(image("train", number).copy())
            if mirrored:
                pixels = pixels.flip(-1)
            made[(x == latent).flatten(1).all(1)] = scaled(pixels)
        return made


@pytest.fixture
def copier(planted: str, monkeypatch: pytest.MonkeyPatch) -> NAIGN:
    """A model that three of 300 samples of seed 0 show to have memorised."""
    small_blocks(monkeypatch)
    metadata = {"shape": SHAPE, "latents": {"name": "gaussian"}, "prior": {"name": "none"}}
    metadata["config"] = {"data": {"path": planted}}
    model = NAIGN(Copier(), metadata)
    model.network.latents.copy_(model.latent(torch.tensor(list(COPIED))))
    monkeypatch.setattr(NAIGN, "from_pretrained", lambda run, device: model)
    return model


def audit(**options: Any) -> dict[str, Any]:
    return copies("run", CopiesOptions(**options), Accelerator(cpu=True))


def test_a_prior_that_is_not_fitted_is_named(copier: NAIGN, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copier.prior.learns = True
    copier.metadata["fitted"] = 0.5
    audit(samples=4, to=str(tmp_path))
    assert "run stopped before its prior was fitted: its samples say nothing" in capsys.readouterr().err


def test_every_planted_copy_is_found_and_nothing_else(copier: NAIGN, planted: str, tmp_path: Path) -> None:
    found = audit(samples=SAMPLES, to=str(tmp_path), threshold=8.0)
    lines = list(csv.DictReader((tmp_path / "copies.csv").read_text().splitlines()))
    samples = [line for line in lines if line["query"] == "sample"]
    near = {int(line["number"]): line for line in samples if float(line["distance"]) <= 8}
    assert len(samples) == SAMPLES and set(near) == set(COPIED) and found["share"] == 0.01
    for number, (original, mirrored) in COPIED.items():
        alike = ("train-005", "train-006", "train-640") if original == 640 else (f"train-{original:03d}",)
        assert near[number]["key"] in alike
        assert (float(near[number]["distance"]), near[number]["mirrored"]) == (
            0,
            str(int(mirrored)),
        )
    assert len(lines) == SAMPLES + 90 and found["test_share"] == pytest.approx(2 / 90)  # planted in the test images
    assert json.loads((tmp_path / "copies.json").read_text()) == found
    assert {path.name for path in tmp_path.iterdir()} == {
        "copies.csv",
        "copies.json",
        "copies.png",
    }


def test_only_exact_copies_are_within_a_threshold_of_0(copier: NAIGN, tmp_path: Path) -> None:
    report = audit(samples=SAMPLES, to=str(tmp_path), threshold=0.0)
    assert (report["threshold"], report["share"], report["test_share"]) == (
        0,
        0.01,
        pytest.approx(1 / 90),
    )


def test_distances_are_those_of_brute_force(copier: NAIGN, planted: str, tmp_path: Path) -> None:
    audit(samples=20, to=str(tmp_path))
    lines = list(csv.DictReader((tmp_path / "copies.csv").read_text().splitlines()))
    train = read_split(planted, "train")[0].double()
    drawn = ((copier.sample(20).clamp(-1, 1) + 1) * 127.5).round()
    tests = read_split(planted, "test")[0]
    for line, query in zip(lines, torch.cat([drawn, tests]).double(), strict=True):
        squares = [(train - view).square().flatten(1).mean(1).min() for view in (query, query.flip(-1))]
        assert float(line["distance"]) == pytest.approx(float(min(squares).sqrt()), rel=1e-12)


def test_features_of_an_encoder(digits: str, save_untrained: Any, tmp_path: Path) -> None:
    model = save_untrained(
        tmp_path / "model",
        data=digits,
        shape=(1, 8, 8),
        config=ConvConfig(width=4, code=8),
    )
    found = copies(
        model,
        CopiesOptions(encoder="digits-cnn64", samples=10),
        Accelerator(cpu=True),
    )
    assert found["encoder"] == "digits-cnn64" and 0 < found["threshold"] < 2
    assert (tmp_path / "model/evaluation/copies.png").exists()


def test_the_default_threshold_is_a_quantile_of_the_test_images() -> None:
    samples = torch.tensor([1.0, 5.0, 10.0, 11.0], dtype=torch.float64)
    tests = torch.arange(1.0, 1001.0, dtype=torch.float64)
    assert judge(samples, tests, None) == {
        "threshold": 10,
        "share": 0.75,
        "test_share": 0.01,
    }


def test_a_report_shows_the_copies_of_its_model(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    page = f"<p>before</p>{COPIES}{COPIES}<p>after</p>"
    assert with_copies(page, store, "a") == page
    values = {
        "training_images": 5,
        "encoder": "pixels",
        "samples": 4,
        "threshold": 1.0,
        "weights": "a",
        "share": 0.25,
        "test_share": 0.25,
    }
    store.put("copies.json", json.dumps(values).encode())
    store.put("copies.png", b"picture")
    shown = with_copies(page, store, "a")
    assert "25.0 % of\n4 samples" in shown and "base64,cGljdHVyZQ==" in shown and shown.endswith("<p>after</p>")
    assert with_copies(shown, store, "a") == shown and with_copies(page, store, "b") == page


def test_the_command_and_the_report(
    digits: str,
    save_untrained: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    model = save_untrained(
        tmp_path / "model",
        data=digits,
        shape=(1, 8, 8),
        config=ConvConfig(width=4, code=8),
    )

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["naign", *arguments])
        main()
        return capsys.readouterr().out

    run("evaluate", model, "--samples", "20")
    assert "samples are within" not in (tmp_path / "model/evaluation/report.html").read_text()
    assert "of a training image" in run("copies", model, "--samples", "20")
    report = (tmp_path / "model/evaluation/report.html").read_text()
    assert "20 samples are within" in report
    run("evaluate", model, "--samples", "20")
    assert "20 samples are within" in (tmp_path / "model/evaluation/report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples is 0: it must be at least 1"),
        ({"seed": -1}, "--seed is -1: it must be 0 to"),
        ({"threshold": -1.0}, "--threshold is -1.0: it must be 0 or more"),
        ({"threshold": float("nan")}, "--threshold is nan: it must be 0 or more"),
        ({"encoder": "mnist-cnn64"}, "--encoder 'mnist-cnn64' reads"),
        ({"data": "DIGITS"}, "holds examples of shape"),
        ({"data": "none"}, "no data set here"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any],
    message: str,
    copier: NAIGN,
    digits: str,
    tmp_path: Path,
) -> None:
    options = {name: digits if value == "DIGITS" else value for name, value in options.items()}
    with pytest.raises(InputError, match=message):
        audit(**{"to": str(tmp_path)} | options)


def test_a_hub_needs_a_folder() -> None:
    with pytest.raises(InputError, match="give a folder for the results with --to"):
        copies("hf://user/model", CopiesOptions(), Accelerator(cpu=True))


def test_points_have_no_picture(points: str, save_untrained: Any, tmp_path: Path) -> None:
    model = save_untrained(tmp_path / "model", data=points, shape=(2,), config=PointConfig(width=8))
    found = copies(model, CopiesOptions(samples=50), Accelerator(cpu=True))
    assert found["test_share"] == pytest.approx(0.01, rel=0.1)
    assert {path.name for path in (tmp_path / "model/evaluation").iterdir()} == {
        "copies.csv",
        "copies.json",
    }
