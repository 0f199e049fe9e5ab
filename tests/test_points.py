"""benchmarks/points.py says of networks that are perfect, or blind, what one knows of them."""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from naign.data.sources import toys
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def truths(benchmarks: None) -> dict[str, Callable[[], Any]]:
    known: dict[str, Callable[[], Any]] = runpy.run_path(str(ROOT / "benchmarks/points.py"))["TRUTHS"]
    return known


@dataclass(frozen=True, slots=True)
class Known:
    """A model that draws `samples` and whose f is `apply`."""

    samples: Tensor
    apply: Callable[[Tensor], Tensor]

    def sample(self, n: int) -> Tensor:
        return self.samples[:n]

    def project(self, points: Tensor) -> Tensor:
        return self.apply(points)

    def energy(self, points: Tensor) -> Tensor:
        return (self.apply(points) - points).square().mean(1)


def drawn(name: str) -> Tensor:
    return torch.from_numpy(toys.draw(name, 10_000, seed=3)[0])


@pytest.mark.parametrize(("name", "parts"), [("gaussians", 8), ("gaussians25", 25), ("spirals", 2), ("ring", 1)])
def test_the_data_itself_covers_every_part_and_lies_near(truths, name, parts):
    found = truths[name]().judge(Known(drawn(name), lambda x: x + 5))
    assert found["modes"] == found["of"] == parts
    assert found["near"] > 0.99 and found["twice"] == 0


def test_a_mode_that_is_missing_is_missed(truths):
    points, labels = toys.draw("gaussians", 10_000, seed=3)
    found = truths["gaussians"]().judge(Known(torch.from_numpy(points[labels > 1]), torch.zeros_like))
    assert found["modes"] == 6


def test_a_projector_onto_the_ring_has_the_distance_for_its_energy(truths):
    found = truths["ring"]().judge(Known(drawn("ring"), lambda x: 0.7 * x / x.norm(dim=1, keepdim=True)))
    assert found["rank"] > 0.999 and found["error"] < 0.001 and found["twice"] == 1
    half = truths["ring"]().judge(Known(drawn("ring"), lambda x: (x + 0.7 * x / x.norm(dim=1, keepdim=True)) / 2))
    assert half["rank"] > 0.999 and half["error"] == pytest.approx(0.5, abs=0.01)


def test_energy_that_falls_with_density_has_rank_one(truths):
    law = truths["gaussians"]()

    def moved(points: Tensor) -> Tensor:  # by the root of 10 - log p
        return points + (10 - law.log_density(points)).sqrt().float()[:, None]

    assert law.judge(Known(drawn("gaussians"), moved))["log p"] == pytest.approx(1, abs=1e-4)
