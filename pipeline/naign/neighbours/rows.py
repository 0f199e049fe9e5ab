"""Images as rows of values, and the nearest row of an index to each of them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from naign.match.exchange import Ranks
from naign.match.pool import block_range
from naign.match.sharded import ShardedIndex
from naign.terminal import counted

VIEWS = 2  # an image as it is, and mirrored
ROWS = 256
MOST = 4096
VALUES = 2**24
"""Images that are read or drawn at once, and their values: at most these, but at least ROWS images."""
ASKED = 2**25
"""Values of rows that are float32 at once."""


class Part(NamedTuple):
    """This rank's images of a set."""

    name: str
    first: int  # the number of the first
    images: Tensor  # (n, *shape) uint8


def read_part(
    name: str,
    count: int,
    read: Callable[[int, int], Tensor],
    shape: tuple[int, ...],
    ranks: Ranks,
) -> Part:
    """This rank's part of `count` images. `read(first, last)` returns stored images (n, *shape) uint8, of blocks that
    are the same for every number of ranks.
    """
    most = min(MOST, VALUES // math.prod(shape))
    size = max(ROWS, most // ROWS * ROWS)
    first, last = block_range(
        count,
        size,
        ranks.rank,
        ranks.world,
    )
    images = torch.empty(last - first, *shape, dtype=torch.uint8)
    with counted(f"reading {name}", total=last - first, unit="image", shown=ranks.rank == 0) as bar:
        for low in range(first, last, size):
            high = min(low + size, last)
            images[low - first : high - first] = read(low, high)
            bar.update(high - low)
    return Part(name, first, images)


def build_index(part: Part, ranks: Ranks) -> ShardedIndex:
    """Collective: an index of all ranks' parts, by the images' numbers."""
    index = ShardedIndex(math.prod(part.images.shape[1:]))
    step = max(1, ASKED // index.dims)
    for low in range(0, max(ranks.collect(len(part.images))), step):
        rows = part.images[low : low + step].flatten(1)
        index.add(rows.float(), part.first + low)  # whole numbers, so that distances are exact
    return index


class Nearest(NamedTuple):
    """The nearest candidate of each query, by the query's number."""

    distances: Tensor  # (q,) float64: root mean square difference of pixels, in levels of 0 to 255
    candidates: Tensor  # (q,) int64
    mirrored: Tensor  # (q,) bool: whether the query is nearer mirrored


def find_nearest(
    queries: Part,
    index: ShardedIndex,
    ranks: Ranks,
    device: torch.device,
) -> Nearest:
    """Collective: the nearest candidate of each query, which is also mirrored; the first by (distance, number)."""
    step = max(1, ASKED // (VIEWS * index.dims * ranks.world))
    sizes = ranks.collect(len(queries.images))
    distances = []
    numbers = []
    mirrored = []
    with counted(f"comparing {queries.name}", total=max(sizes), unit="image", shown=ranks.rank == 0) as bar:
        for low in range(0, max(sizes), step):
            images = queries.images[low : low + step].to(device)
            rows = torch.cat([images, images.flip(-1)]).flatten(1)
            found = index.search(rows.float())
            straight, turned = found[0].cpu().view(VIEWS, -1)
            number, other = found[1].cpu().view(VIEWS, -1)
            is_turned = (turned < straight) | (turned == straight) & (other < number)
            distances.append(torch.where(is_turned, turned, straight))
            numbers.append(torch.where(is_turned, other, number))
            mirrored.append(is_turned)
            bar.update(step)
    squares = ranks.gather(torch.cat(distances), sizes)
    return Nearest(
        (squares / index.dims).sqrt(),
        ranks.gather(torch.cat(numbers), sizes),
        ranks.gather(torch.cat(mirrored), sizes),
    )
