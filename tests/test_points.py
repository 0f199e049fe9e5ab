"""benchmarks/points.py says of networks that are perfect, or blind, what one knows of them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def truths(benchmarks):
    from points import TRUTHS

    return TRUTHS


@dataclass(frozen=True, slots=True)
class Known:
    """A model that draws `samples` and whose f is `project`."""

    samples: torch.Tensor
    project: Any

    def sample(self, n):
        return self.samples[:n]

    def energy(self, points):
        return (self.project(points) - points).square().mean(1)


def drawn(name):
    from points import draw  # once `truths` has found the folder

    points, labels = draw(name, 10_000, seed=3)
    return torch.from_numpy(points), labels


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gaussians", 8),
        ("spirals", 2),
        ("ring", 1),
    ],
)
def test_the_data_itself_covers_every_part_and_lies_near(truths, name, parts):
    points, _ = drawn(name)
    found = truths[name]().judge(Known(points, lambda x: x + 5 + x.square()))
    assert found["modes"] == found["of"] == parts
    assert found["near"] > 0.99
    assert found["twice"] == 0


def test_a_mode_that_is_missing_is_missed(truths):
    points, labels = drawn("gaussians")
    found = truths["gaussians"]().judge(Known(points[labels > 1], torch.zeros_like))
    assert found["modes"] == 6


def test_a_projector_onto_the_ring_has_the_distance_for_its_energy(truths):
    points, _ = drawn("ring")

    def onto(x):
        return 0.7 * x / x.norm(dim=1, keepdim=True)

    found = truths["ring"]().judge(Known(points, onto))
    assert found["rank"] > 0.999
    assert found["error"] < 0.001
    assert found["twice"] == 1
    half = truths["ring"]().judge(Known(points, lambda x: (x + onto(x)) / 2))
    assert half["error"] == pytest.approx(0.5, abs=0.01)


def test_energy_that_falls_with_density_has_rank_one(truths):
    law = truths["gaussians"]()
    points, _ = drawn("gaussians")

    def moved(x):  # by the root of 10 - log p
        return x + (10 - law.log_density(x)).sqrt().float()[:, None]

    assert law.judge(Known(points, moved))["log p"] == pytest.approx(1, abs=1e-4)
