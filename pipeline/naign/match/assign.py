"""match.assignment=one_to_one: nearest pairs first, each sample at most once."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from naign.match.exchange import Ranks

NEIGHBOURS = 16
MOST_PAIRS = 2**22
"""k of the first search. Each later one has four times as many, up to MOST_PAIRS in all."""


def assign_once(
    find: Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]],
    ranks: Ranks,
    counts: list[int],  # images of each rank
) -> tuple[Tensor, Tensor]:
    """Collective: squared distance float64 and id, each (n,), of the sample of each image of this rank.

    `find(images, k, assigned)` returns squared distances and ids, (m, k) each, of the nearest samples to some images of
    this rank (m,), without the samples `assigned`.

    The least of all pairs by (distance, number of the image, id) is assigned, then the least of the pairs of the
    remaining images and samples, and so on. Every rank computes this on the k nearest samples of all images. An image
    whose k samples are all assigned to others needs more, and no pair beyond its last one is settled until then. All
    unsettled images search again, among the samples that are left.
    """
    edges = np.cumsum([0, *counts])
    first, last = edges[ranks.rank : ranks.rank + 2]
    distances = np.zeros(edges[-1])
    ids = np.full(edges[-1], -1)
    unsettled = np.arange(edges[-1])
    neighbours = NEIGHBOURS
    while len(unsettled):
        mine = unsettled[(first <= unsettled) & (unsettled < last)] - first
        assigned = torch.from_numpy(ids[ids >= 0])
        found, found_ids = find(torch.from_numpy(mine), neighbours, assigned)
        sizes = np.diff(np.searchsorted(unsettled, edges)).tolist()
        pairs = torch.stack([found.view(torch.int64), found_ids], dim=2)
        every = ranks.gather(pairs, sizes).numpy()
        near = every[:, :, 0].view(np.float64)
        rows, columns = settled_pairs(near, every[:, :, 1])
        distances[unsettled[rows]] = near[rows, columns]
        ids[unsettled[rows]] = every[rows, columns, 1]
        unsettled = unsettled[ids[unsettled] < 0]
        most = MOST_PAIRS // max(1, len(unsettled))
        neighbours = max(NEIGHBOURS, min(4 * neighbours, most))
    return torch.from_numpy(distances[first:last]), torch.from_numpy(ids[first:last])


def settled_pairs(
    distances: NDArray[np.float64], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs (rows, columns) that are assigned whatever samples each image has beyond its k nearest: all that come
    before the last known pair of the first image that has no sample left. Both arguments, (n, k), are sorted along each
    row by (distance, id), with inf and -1 where there is no sample.
    """
    neighbours = ids.shape[1]
    column_of = dict[int, int]()  # by row
    taken = {-1}
    for pair in np.argsort(distances, axis=None, kind="stable").tolist():  # by distance, then image, then id
        row, column = divmod(pair, neighbours)
        sample = int(ids[row, column])
        if row in column_of:
            continue
        if sample not in taken:
            column_of[row] = column
            taken.add(sample)
        elif column == neighbours - 1:
            break
    rows = np.array(list(column_of), np.int64)
    columns = np.array(list(column_of.values()), np.int64)
    return rows, columns
