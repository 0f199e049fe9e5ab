"""Copies of training images among samples: all that are planted."""

import json
import os

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from naign.data.loader import read_split
from naign.data.scale import eight_bits, scaled
from naign.model.naign import NAIGN
from naign.neighbours import CopiesOptions
from naign.neighbours.copies import copies, judge
from tests.model.made import wrapped
from tests.neighbours.planted import SHAPE, image, read_csv, small_blocks
from tests.refused import refused

SAMPLES = 300
COPIED = {
    7: (40, False),
    8: (41, True),
    290: (640, False),
}
"""Samples that are copies: of which training image, mirrored or not."""


class Copier(nn.Module):
    """Noise, but for the samples of COPIED."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(len(COPIED), *SHAPE))

    def forward(self, x):
        made = x.clone()
        for latent, (number, mirrored) in zip(self.latents, COPIED.values(), strict=True):
            pixels = torch.from_numpy(image("train", number).copy())
            if mirrored:
                pixels = pixels.flip(-1)
            made[(x == latent).flatten(1).all(1)] = scaled(pixels)
        return made


@pytest.fixture
def copier(planted, monkeypatch):
    """A model that three of 300 samples of seed 0 show to have memorised."""
    small_blocks(monkeypatch)
    model = wrapped(Copier(), SHAPE, config={"data": {"path": planted}})
    model.network.latents.copy_(model.latent(torch.tensor(list(COPIED))))
    monkeypatch.setattr(NAIGN, "from_pretrained", lambda run, device: model)
    return model


def audit(**options):
    return copies("run", CopiesOptions(**options), Accelerator(cpu=True))


def test_a_prior_that_is_not_fitted_is_named(copier, tmp_path, capsys):
    copier.prior.learns = True
    copier.metadata["fitted"] = 0.5
    audit(samples=4, to=str(tmp_path))
    assert "run stopped before its prior was fitted: its samples say nothing" in capsys.readouterr().err


def test_every_planted_copy_is_found_and_nothing_else(copier, tmp_path):
    found = audit(samples=SAMPLES, to=str(tmp_path), threshold=0.0)
    lines = read_csv(tmp_path / "copies.csv")
    assert len(lines) == SAMPLES + 90
    near = {}
    for line in lines[:SAMPLES]:
        assert line["query"] == "sample"
        if float(line["distance"]) == 0:
            near[int(line["number"])] = line
    assert set(near) == set(COPIED)
    for number, (original, mirrored) in COPIED.items():
        alike = [f"train-{original:03d}"]
        if original == 640:
            alike += ["train-005", "train-006"]
        assert near[number]["key"] in alike
        assert near[number]["mirrored"] == str(int(mirrored))
    assert found["threshold"] == 0
    assert found["share"] == 0.01
    assert found["test_share"] == pytest.approx(1 / 90)  # one is planted in the test images without noise
    assert json.loads((tmp_path / "copies.json").read_text()) == found
    assert set(os.listdir(tmp_path)) == {"copies.csv", "copies.json", "copies.png"}


def test_distances_are_those_of_brute_force(copier, planted, tmp_path):
    audit(samples=20, to=str(tmp_path))
    train = read_split(planted, "train")[0].double()
    drawn = eight_bits(copier.sample(20))
    tests = read_split(planted, "test")[0]
    both = torch.cat([train, train.flip(-1)]).flatten(1)
    queries = torch.cat([drawn, tests]).double().flatten(1)
    nearest = torch.cdist(queries, both, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    expected = nearest / both.shape[1] ** 0.5
    found = [float(line["distance"]) for line in read_csv(tmp_path / "copies.csv")]
    assert found == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-12)


def test_the_default_threshold_is_a_quantile_of_the_test_images():
    samples = torch.tensor([1.0, 5.0, 10.0, 11.0], dtype=torch.float64)
    tests = torch.arange(1.0, 1001.0, dtype=torch.float64)
    judged = judge(samples, tests, None)
    assert judged == {"threshold": 10, "share": 0.75, "test_share": 0.01}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "--samples is 0: it must be at least 1"),
        ({"threshold": float("nan")}, "--threshold is nan: it must be 0 or more"),
    ],
)
def test_bad_options_are_one_sentence(options, message, copier, tmp_path):
    with refused(message):
        audit(to=str(tmp_path), **options)


def test_a_hub_needs_a_folder():
    with refused("give one for the results with --to"):
        copies("hf://user/model", CopiesOptions(), Accelerator(cpu=True))
