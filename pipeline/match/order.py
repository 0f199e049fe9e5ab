"""The total order (distance, id), which makes an answer unique."""

import numpy as np
import torch
from torch import Tensor

NO_ID = torch.iinfo(torch.int64).max  # of a missing candidate; sorts behind all others


def sort_lexically(*keys: Tensor) -> Tensor:
    """The permutation (n,) that sorts by the first key, then the second, and so on."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[torch.sort(key[order], stable=True).indices]
    return order


def keep_least(distances: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` by (distance, id) of each query's answers from several ranks, (world, q, k) each."""
    if len(distances) == 1:
        return distances[0], ids[0]
    distances, ids = distances.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1)
    order = torch.sort(ids, dim=1, stable=True).indices
    order = order.gather(1, torch.sort(distances.gather(1, order), dim=1, stable=True).indices)[:, :count]
    return distances.gather(1, order), ids.gather(1, order)


def first_copies(rows: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the rows (n, d) that have fewer than `count` bitwise equal rows before them."""
    raw = rows.cpu().numpy()
    kind = np.unique(raw.view(np.dtype((np.void, raw.dtype.itemsize * raw.shape[1]))).ravel(), return_inverse=True)[1]
    order = np.argsort(kind, kind="stable")
    place = np.arange(len(kind)) - np.searchsorted(kind[order], kind[order])
    return torch.from_numpy(np.sort(order[place < count])).to(rows.device)
