"""Toy distributions of independent points in the plane, about in [-1, 1]², whose densities are known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from naign.data.sources.source import Source, numbered
from naign.errors import InputError

TRAIN = 50_000  # points
TEST = 10_000
STREAM = 1  # second word of the key: packing deals with 0 there, and would sort what was drawn by the same numbers

Points = npt.NDArray[Any]  # (count, 2) float64
Labels = npt.NDArray[np.int64]  # (count,)


def spirals(label: Labels, random: np.random.Generator) -> Points:
    """Two arms, r = 0.9 sqrt(u), angle 3 pi sqrt(u) (+ pi), u uniform."""
    root = np.sqrt(random.uniform(0, 1, len(label)))
    radius = 0.9 * root[:, None]
    angle = 3 * np.pi * root + np.pi * label
    return _circle(radius, angle)


def gaussians(label: Labels, random: np.random.Generator) -> Points:
    """Eight centres evenly on the circle of radius 0.8."""
    return _circle(0.8, 2 * np.pi * label / 8)


def gaussians25(label: Labels, random: np.random.Generator) -> Points:
    """25 centres on a grid of 5 x 5 that reaches from -0.8 to 0.8."""
    cells = np.stack([label % 5, label // 5], axis=1)
    return 0.4 * cells - 0.8


def ring(label: Labels, random: np.random.Generator) -> Points:
    """The circle of radius 0.7 itself, angle uniform: a manifold whose distance is known everywhere."""
    angle = random.uniform(0, 2 * np.pi, len(label))
    return _circle(0.7, angle)


def _circle(radius: float | Points, angle: Points) -> Points:
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points: Points = radius * directions
    return points


Place = Callable[[Labels, np.random.Generator], Points]

DISTRIBUTIONS: dict[str, tuple[int, float, Place]] = {
    "spirals": (2, 0.02, spirals),
    "gaussians": (8, 0.06, gaussians),
    "gaussians25": (25, 0.03, gaussians25),
    "ring": (1, 0.0, ring),
}
"""Number of labels (parts, alike in weight), deviation of the normal noise that is added, and where points lie."""


def draw(name: str, count: int, *, seed: int) -> tuple[npt.NDArray[np.float32], Labels]:
    """`count` points (count, 2) float32 and the part each came from, (count,) int64. InputError for an unknown name."""
    if name not in DISTRIBUTIONS:
        raise InputError(f"no toy data set {name!r}: choose toy2d: with one of {', '.join(DISTRIBUTIONS)}")
    parts, deviation, place = DISTRIBUTIONS[name]
    key = np.array([seed % 2**64, STREAM], np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    labels = random.integers(parts, size=count)
    points = place(labels, random)
    points = points + random.normal(0, deviation, (count, 2))
    return points.astype(np.float32), labels


def toy2d(name: str, seed: int = 0) -> Source:
    """A distribution as a source, 50,000 points to train and 10,000 to test, drawn together. Raises InputError."""
    points, labels = draw(name, TRAIN + TEST, seed=seed)
    parts, _, _ = DISTRIBUTIONS[name]
    return Source(
        name=f"toy2d:{name}",
        kind="point",
        shape=(2,),
        labels=tuple(f"part {number}" for number in range(parts)),
        splits={
            "train": numbered("train", points[:TRAIN], labels[:TRAIN]),
            "test": numbered("test", points[TRAIN:], labels[TRAIN:]),
        },
    )
