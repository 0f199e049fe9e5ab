"""Each sample at most once: match.assignment=one_to_one takes nearest pairs first, optimal pairs of the least sum."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from pipeline.match.exchange import Ranks

MOST_NEIGHBOURS = 2**20  # that `search` looks for
NEIGHBOURS, MOST_PAIRS = 16, 2**22
"""Samples that an image asks for at first, and pairs that all images together ask for at most in later searches, each
for twice as many samples as in the one before if most images were settled, else for eight times as many."""


def assign_once(
    find: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]],  # of match_round
    ranks: Ranks,
    counts: list[int],  # images of each rank
) -> tuple[Tensor, Tensor]:
    """Collective: squared distance float64 and id, each (n,), of the sample that each image of this rank gets.

    The least of all pairs by (distance, number of the image, id) is taken, then the least of the pairs of the images
    and samples that remain, and so on. Every rank computes this on the nearest few samples of all images. An image that
    finds all of these taken needs more, and until then no pair behind its last one is settled. All images that are not
    settled search again among the samples that are left.
    """
    edges = np.cumsum([0, *counts])
    answers = np.zeros((edges[-1], 2), np.int64)  # of each image: the bits of the distance, and the id
    settled = np.zeros(0, np.int64)  # ids
    asking, neighbours = np.arange(edges[-1]), NEIGHBOURS
    while len(asking):
        parts = np.split(asking, np.searchsorted(asking, edges[1:-1]))
        rows = torch.from_numpy(parts[ranks.rank] - edges[ranks.rank])
        distances, ids = find(rows, neighbours, torch.from_numpy(np.sort(settled)) if len(settled) else None)
        pairs = torch.stack([distances.view(torch.int64), ids], dim=2)
        found = ranks.gather(pairs, [len(part) for part in parts]).numpy()
        taken, columns = take_in_order(found[:, :, 0].view(np.float64), found[:, :, 1])
        answers[asking[taken]] = found[taken, columns]
        settled = np.concatenate([settled, found[taken, columns, 1]])
        most = MOST_PAIRS // max(1, len(asking) - len(taken))
        neighbours = max(NEIGHBOURS, min(neighbours * (2 if 2 * len(taken) > len(asking) else 8), most))
        asking = np.delete(asking, taken)
    mine = torch.from_numpy(answers[edges[ranks.rank] : edges[ranks.rank + 1]])
    return mine[:, 0].contiguous().view(torch.float64), mine[:, 1].contiguous()


def assign_optimally(
    find: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]],  # of match_round
    ranks: Ranks,
    counts: list[int],  # images of each rank
) -> tuple[Tensor, Tensor]:
    """Collective: as `assign_once`, but the sum of the squared distances is the least: optimal transport of the round.

    Every rank solves this for the nearest few samples of all images, where an image may also have some sample behind
    its last one, at that one's distance. What lies there costs no less, so a solution in which no image does is optimal
    among all samples, up to rounding of the sum. Images that do ask for more samples.
    """
    edges = np.cumsum([0, *counts])
    known = [np.zeros((0, 2), np.int64)] * int(edges[-1])  # of each image: the bits of distances, and ids
    asking, neighbours = np.arange(edges[-1]), NEIGHBOURS
    while len(asking):
        parts = np.split(asking, np.searchsorted(asking, edges[1:-1]))
        distances, ids = find(torch.from_numpy(parts[ranks.rank] - edges[ranks.rank]), neighbours, None)
        pairs = torch.stack([distances.view(torch.int64), ids], dim=2)
        for image, row in zip(asking, ranks.gather(pairs, [len(part) for part in parts]).numpy(), strict=True):
            known[image] = row
        columns = solve([row[:, 0].view(np.float64) for row in known], [row[:, 1] for row in known])
        asking = np.flatnonzero(columns < 0)
        neighbours = min(2 * max((len(known[image]) for image in asking), default=0), MOST_NEIGHBOURS)
    answers = np.array([row[column] for row, column in zip(known, columns, strict=True)]).reshape(-1, 2)
    mine = torch.from_numpy(answers[edges[ranks.rank] : edges[ranks.rank + 1]])
    return mine[:, 0].contiguous().view(torch.float64), mine[:, 1].contiguous()


def solve(distances: list[NDArray[np.float64]], ids: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The place in its lists of the sample that each image gets; -1: one behind them. Lists as in `take_in_order`."""
    least, numbers = np.concatenate(distances), np.concatenate(ids)
    rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    places = np.concatenate([np.arange(len(each)) for each in ids])
    there = numbers >= 0
    names, columns = np.unique(numbers[there], return_inverse=True)
    more = np.flatnonzero([each[-1] >= 0 for each in ids])  # images that may have samples behind their last
    last = np.array([distances[row][-1] for row in more])
    weights = np.concatenate([least[there], last])
    weights = 1 + weights / max(float(weights.max()), 1e-300)  # a weight of 0 would stand for no pair
    rows, columns = np.concatenate([rows[there], more]), np.concatenate([columns, len(names) + np.arange(len(more))])
    graph = csr_array((weights, (rows, columns)), shape=(len(ids), len(names) + len(more)))
    chosen = min_weight_full_bipartite_matching(graph)[1]
    place = csr_array((np.concatenate([places[there], 0 * more - 1]) + 2, (rows, columns)), shape=graph.shape)
    found: NDArray[np.int64] = np.asarray(place[np.arange(len(ids)), chosen]).ravel() - 2
    return found


def take_in_order(
    distances: NDArray[np.float64],  # (n, k): ascending along each row; inf where there is no sample
    ids: NDArray[np.int64],  # (n, k): ascending among equal distances; -1 where there is no sample
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs (rows, columns) that are taken whatever unknown samples each image has behind its known ones.

    An unknown pair comes after all known pairs of its image. So the pairs taken before the first last pair of an image
    whose samples are all taken are settled.
    """
    names, numbers = np.unique(ids, return_inverse=True)
    numbers = numbers.reshape(ids.shape)
    gone = names < 0
    column = np.zeros(len(ids), np.int64)  # of the nearest sample that each image can still have
    least, choice = distances[:, 0].copy(), numbers[:, 0].copy()
    bound, taken = (math.inf, 0), list[int]()
    while True:
        row = int(least.argmin())
        if (least[row], row) >= bound:
            rows = np.array(taken, np.int64)
            return rows, column[rows]
        taken.append(row)
        least[row] = math.inf
        gone[choice[row]] = True
        losers = np.flatnonzero(choice == choice[row])
        choice[row] = -1
        losers = losers[losers != row]
        while len(losers):
            column[losers] += 1
            starved = losers[column[losers] == ids.shape[1]]
            if len(starved):
                last = distances[starved, -1]
                bound = min(bound, min(zip(last.tolist(), starved.tolist(), strict=True)))
                least[starved], choice[starved] = math.inf, -1
                losers = losers[column[losers] < ids.shape[1]]
            least[losers], choice[losers] = distances[losers, column[losers]], numbers[losers, column[losers]]
            losers = losers[gone[choice[losers]]]
