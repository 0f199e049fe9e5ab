"""Random windows and mirroring of images: functions of (seed, round, row), the same on every world size."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.samples import Array

Draws = npt.NDArray[np.float64]
"""(rows, 4), uniform in [0, 1)."""


def draws(seed: int, round: int, first: int, last: int) -> Draws:
    """The random numbers of rows [first, last) of a round: Philox counted by row, so that any part is drawn alone."""
    key = np.array([seed % 2**64, round + 2**63], np.uint64)  # apart from the keys that order shards
    raw: Any = np.random.Philox(key=key, counter=[first, 0, 0, 0]).random_raw(4 * (last - first))
    uniform: Draws = (raw >> np.uint64(11)).reshape(-1, 4) * 2.0**-53
    return uniform


def central(rows: int) -> Draws:
    """Draws that take the central window and mirror nothing."""
    return np.full((rows, 4), 0.5)


def crop(image: Array, size: int, drawn: npt.NDArray[np.float64]) -> Array:
    """A window (C, size, size) of an image (C, H, W)."""
    _, height, width = image.shape
    top, left = int(drawn[0] * (height - size + 1)), int(drawn[1] * (width - size + 1))
    return image[:, top : top + size, left : left + size]


def flip(images: Array, drawn: Draws) -> None:
    """Mirror about half of the images (n, C, H, W), in place."""
    chosen = drawn[:, 2] < 0.5
    images[chosen] = images[chosen, ..., ::-1]
