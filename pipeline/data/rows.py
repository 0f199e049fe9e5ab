"""A rank's rows of a round, and filling them: samples that were read are decoded into the memory of their rows."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.data.decode import Array
from pipeline.data.reader import Raw, Reader
from pipeline.data.sample import Draws
from pipeline.data.sample import flip as mirror
from pipeline.storage.retry import Tally


@dataclass(kw_only=True, slots=True, frozen=True)
class Rows:
    """One rank's part of a round; row i is position i of that part, whatever the number of workers."""

    images: Tensor  # (n, C, H, W) uint8 of images, in memory as (n, H, W, C); (n, D) float32 of points
    labels: Tensor  # (n,) int64, -1 where there is none
    keys: list[str]  # n of them
    epochs: Tensor  # (n,) int64: in which epoch each row was taken
    tally: Tally = field(default_factory=Tally)  # what reading them has cost
    broken: list[str] = field(default_factory=list)  # the problem of each sample that another one stands in for


def new_images(shape: tuple[int, ...], dtype: str, rows: int) -> Array:
    """Memory for images (rows, C, H, W), in which the channels of a pixel lie together; for points (rows, D).

    NumPy's, not torch's: it asks for huge pages, without which touching new memory takes a tenth of the decoding.
    """
    if len(shape) != 3:
        return np.empty((rows, *shape), dtype)
    channels, height, width = shape
    return np.empty((rows, height, width, channels), dtype).transpose(0, 3, 1, 2)


def new_rows(images: Array) -> Rows:
    """Rows to be filled."""
    labels, epochs = (torch.empty(len(images), dtype=torch.int64) for _ in range(2))
    return Rows(images=torch.from_numpy(images), labels=labels, epochs=epochs, keys=[""] * len(images))


def fill(
    rows: Rows,
    begin: int,
    stored: Iterable[tuple[Reader, Raw]],
    draws: Draws | None = None,
    *,
    flip: bool = False,
) -> dict[int, str]:
    """Decode samples into rows from `begin` on, one a row of `draws`; the problems of broken samples by row.

    The draws say which windows are taken, and with `flip` which images are mirrored; None: the central windows.
    """
    images, labels, epochs = rows.images.numpy(), rows.labels.numpy(), rows.epochs.numpy()
    row, broken = begin - 1, {}
    for row, (reader, raw) in enumerate(stored, begin):
        place = images[row]
        sample = reader.row(raw, place, None if draws is None else draws[row - begin])
        if sample.array is not place:
            place[...] = sample.array
        labels[row], epochs[row], rows.keys[row] = sample.label, sample.epoch, sample.key
        if sample.broken:
            broken[row] = sample.broken
    if flip and draws is not None and images.ndim == 4:
        mirror(images[begin : row + 1], draws)
    return broken
