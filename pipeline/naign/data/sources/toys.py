"""A toy distribution of independent points in the plane, about in [-1, 1]², whose density is known."""

import numpy as np

from naign.data.order import philox
from naign.data.sources.source import Source, numbered
from naign.errors import require

TRAIN = 50_000  # points
TEST = 10_000
PARTS = 8  # centres, evenly on the circle of radius 0.8, alike in weight
DEVIATION = 0.06  # of the normal noise around a centre
STREAM = 1  # second word of the key: packing deals with 0 there, and would sort what was drawn by the same numbers


def toy2d(name: str, seed: int) -> Source:
    """The set `gaussians`, 50,000 points to train and 10,000 to test, drawn together. InputError for another name."""
    require((name == "gaussians", f"no toy data set {name!r}: choose toy2d:gaussians"))
    random = np.random.Generator(philox(seed, STREAM))
    labels = random.integers(PARTS, size=TRAIN + TEST)
    angle = 2 * np.pi * labels / PARTS
    centres = 0.8 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    noise = random.normal(0, DEVIATION, centres.shape)
    points = (centres + noise).astype(np.float32)
    return Source(
        name=f"toy2d:{name}",
        kind="point",
        shape=(2,),
        labels=tuple(f"part {number}" for number in range(PARTS)),
        splits={
            "train": numbered("train", points[:TRAIN], labels[:TRAIN]),
            "test": numbered("test", points[TRAIN:], labels[TRAIN:]),
        },
    )
