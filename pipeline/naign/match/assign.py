"""match.assignment=one_to_one: nearest pairs first, each sample at most once."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from naign.match.exchange import Ranks

NEIGHBOURS, MOST_PAIRS = 16, 2**22
"""Initial k. A later search doubles k, or multiplies it by 8 if most images are unsettled, up to MOST_PAIRS in all."""


def assign_once(
    find: Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]], ranks: Ranks, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Collective: squared distance float64 and id, each (n,), of the sample of each image of this rank. `find` is that
    of `match_round`, `counts` are the images of each rank.

    The least of all pairs by (distance, number of the image, id) is assigned, then the least of the pairs of the
    remaining images and samples, and so on. Every rank computes this on the k nearest samples of all images. An image
    whose k samples are all assigned to others needs more, and no pair beyond its last one is settled until then. All
    unsettled images search again, among the samples that are left.
    """
    edges = np.cumsum([0, *counts])
    answers = np.zeros((edges[-1], 2), np.int64)  # of each image: the bits of the distance, and the id
    assigned = np.zeros(0, np.int64)  # ids
    open_images, neighbours = np.arange(edges[-1]), NEIGHBOURS
    while len(open_images):
        parts = np.split(open_images, np.searchsorted(open_images, edges[1:-1]))
        rows = torch.from_numpy(parts[ranks.rank] - edges[ranks.rank])
        distances, ids = find(rows, neighbours, torch.from_numpy(assigned))
        pairs = ranks.gather(torch.stack([distances.view(torch.int64), ids], dim=2), [len(part) for part in parts])
        nearest = pairs.numpy()
        settled, columns = settle(nearest[:, :, 0].view(np.float64), nearest[:, :, 1])
        answers[open_images[settled]] = nearest[settled, columns]
        assigned = np.concatenate([assigned, nearest[settled, columns, 1]])
        most = MOST_PAIRS // max(1, len(open_images) - len(settled))
        neighbours = max(NEIGHBOURS, min(neighbours * (2 if 2 * len(settled) > len(open_images) else 8), most))
        open_images = np.delete(open_images, settled)
    mine = torch.from_numpy(answers[edges[ranks.rank] : edges[ranks.rank + 1]])
    return mine[:, 0].contiguous().view(torch.float64), mine[:, 1].contiguous()


def settle(distances: NDArray[np.float64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs (rows, columns) that are assigned whatever samples each image has beyond its k nearest: all that come
    before the last known pair of the first image that has no sample left. Both arguments, (n, k), are sorted along each
    row by (distance, id), with inf and -1 where there is no sample.
    """
    settled, taken = dict[int, int](), {-1}
    for pair in np.argsort(distances, axis=None, kind="stable").tolist():  # by distance, then image, then id
        row, column = divmod(pair, ids.shape[1])
        if row in settled:
            continue
        if (sample := int(ids[row, column])) not in taken:
            settled[row] = column
            taken.add(sample)
        elif column == ids.shape[1] - 1:
            break
    return np.array(list(settled), np.int64), np.array(list(settled.values()), np.int64)
