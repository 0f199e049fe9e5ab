"""Images as rows of values, in blocks that are the same for every number of ranks, and which rows are near each other.

Each rank makes the blocks of its part once, and keeps them as files: all queries are compared with all candidates.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from naign.errors import InputError, require
from naign.match import Blocks, search
from naign.match.distances import sort_lexically
from naign.match.matcher import block_range
from naign.model.encoders import open_encoder
from naign.model.scale import scaled
from naign.neighbours.work import Work

PIXELS = "pixels"  # names no encoder: values are compared as they are
ROWS = 256  # images embedded at once, always as many
MOST, VALUES = 4096, 2**24  # rows of a block, and its float32 values: at most these, but at least ROWS rows
ASKED = 2**25  # float32 values of the queries of a search, unless those of one block are more
NEIGHBOURS, ANSWERS = 8, 2**24
"""k of the first search within a distance, which grows by this factor, and neighbours of a rank's queries at once."""
MOST_PAIRS = 2**25  # of a rank's queries: 1 GB
MANY = f"more than {MOST_PAIRS} pairs are within the threshold: lower --threshold"


class Space:
    """What images are compared by. Distances are the root mean square difference of pixels, in levels of 0 to 255, or
    of a point's coordinates; of features the length of the difference of unit vectors, from 0 to 2.
    """

    def __init__(self, encoder: str, shape: tuple[int, ...], device: torch.device) -> None:
        """Pixels, or the features of the encoder of that name. InputError where it does not fit data of that shape."""
        require((encoder == PIXELS or len(shape) == 3, f"--encoder {encoder} is for images, and these are points"))
        self.encoder = None if encoder == PIXELS else open_encoder("--encoder", encoder, shape, device)
        self.views = 2 if len(shape) == 3 else 1  # an image as it is, and mirrored
        values = torch.Size(shape).numel()
        self.dims = self._features(torch.zeros(1, *shape)).shape[1] if self.encoder else values
        self.scale = 1 if self.encoder else values  # squared distance of rows at distance 1
        self.size = max(ROWS, min(MOST, VALUES // max(values, self.dims)) // ROWS * ROWS)  # rows of a block

    def values(self, images: Tensor, number: int) -> Tensor:
        """What is kept of stored images (n, *shape) from `number` on: these, or features (2, n, d) of their views."""
        if not self.encoder:
            return images
        views = scaled(images), scaled(images.flip(-1))
        return torch.stack([independent(self._features, view, number) for view in views])

    def rows(self, values: Tensor) -> Tensor:
        """Rows (views, n, d) float32 of what `values` returned. Pixels stay whole numbers, so distances are exact."""
        if self.encoder:
            return values
        return torch.stack([view.flatten(1).float() for view in (values, values.flip(-1))[: self.views]])

    def distances(self, bits: Tensor) -> Tensor:
        """Distances (n,) float64, of the bits of squared distances of rows."""
        return (bits.contiguous().view(torch.float64) / self.scale).sqrt()

    def _features(self, images: Tensor) -> Tensor:
        assert self.encoder is not None
        return F.normalize(self.encoder.features(images).float())


def independent(features: Callable[[Tensor], Tensor], images: Tensor, number: int) -> Tensor:
    """Features (n, d) of images (n, *shape), of which no row depends on the rows beside it: a matrix product may round
    a row by its place and the product's size, so image i, the first being `number`, is row i % ROWS of ROWS.
    """
    first, last = number % ROWS, number % ROWS + len(images)
    padded = images.new_zeros(max(1, -(-last // ROWS)) * ROWS, *images.shape[1:])
    padded[first:last] = images
    return torch.cat([features(batch) for batch in padded.split(ROWS)])[first:last]


class Rows:
    """The rows of `count` images. This rank has those of [first, last), which are whole blocks."""

    def __init__(self, name: str, count: int, read: Callable[[int, int], Tensor], space: Space, work: Work) -> None:
        """Make what is missing of this rank's blocks; `read(first, last)` returns stored images (n, *shape)."""
        self.name, self.count, self.space, self._work = name, count, space, work
        self.first, self.last = block_range(count, space.size, work.ranks.rank, work.ranks.world)
        self._group = max(1, ASKED // (space.views * space.dims * space.size)) * space.size  # images
        self.groups, self.blocks = -(-count // self._group), -(-(self.last - self.first) // space.size)
        with work.bar(f"reading {name}", self.blocks) as bar:
            for low in range(self.first, self.last, space.size):
                if not work.has(self._part(low)):
                    work.keep(self._part(low), space.values(read(low, min(low + space.size, count)), low))
                bar.update()

    def candidates(self, bar: "tqdm[None]") -> Blocks:
        """This rank's, for a search; each block advances the bar."""

        def make(low: int, high: int) -> Tensor:
            bar.update()
            return self._block(self.first + low)[0] if low < high else torch.empty(0, self.space.dims)

        return Blocks(rows=self.last - self.first, make=make, size=self.space.size)

    def queries(self, group: int) -> tuple[Tensor, Tensor]:
        """This rank's images of a group: numbers (n,) int64, and rows (views, n, d) float32."""
        low, high = (min(max(edge * self._group, self.first), self.last) for edge in (group, group + 1))
        blocks = [self._block(start) for start in range(low, high, self.space.size)]
        return torch.arange(low, high), torch.cat([torch.empty(self.space.views, 0, self.space.dims), *blocks], dim=1)

    def _part(self, low: int) -> str:
        return f"{self.name}-{low // self.space.size:06d}"

    def _block(self, low: int) -> Tensor:
        return self.space.rows(self._work.load(self._part(low)))


def compare(queries: Rows, candidates: Rows, work: Work, device: torch.device, *, within: float = math.inf) -> Tensor:
    """Collective: the nearest candidate of each query and view, or all candidates `within` a distance. On rank 0 rows
    (m, 4) int64 of a query's number, its candidate's, the bits of their squared distance, which sort as it does, and
    the view; elsewhere none. Finished groups of queries are kept.
    """
    ranks, parts = work.ranks, [torch.empty(0, 4, dtype=torch.int64)]
    with work.bar(f"comparing {queries.name}", queries.groups * candidates.blocks) as bar:
        for group in range(queries.groups):
            part = f"near-{queries.name}-{group:06d}"
            if not ranks.broadcast(ranks.rank == 0 and work.has(part), 0):
                numbers, rows = queries.queries(group)
                near = _search(numbers, rows.to(device), candidates, bar, within**2 * queries.space.scale, work)
                near = ranks.gather(near, ranks.collect(len(near)))
                if ranks.rank == 0:
                    work.keep(part, near)
            if ranks.rank == 0:
                parts.append(work.load(part))
    return torch.cat(parts)


def _search(numbers: Tensor, rows: Tensor, candidates: Rows, bar: "tqdm[None]", limit: float, work: Work) -> Tensor:
    """Collective: as `compare`, of some queries. Where the k-th neighbour is within the limit, k grows."""
    parts, k = [torch.empty(0, 4, dtype=torch.int64)], 1 if limit == math.inf else min(NEIGHBOURS, candidates.count)
    queries, left = rows.flatten(0, 1), torch.arange(len(rows) * len(numbers))
    while most := max(work.ranks.collect(len(left))):
        again = [left[:0]]
        for start in range(0, most, size := ANSWERS // k + 1):
            asked = left[start : start + size]
            some = queries[asked.to(queries.device)]
            answer = search(some, candidates.candidates(bar), candidates.first, neighbours=k, within=limit)
            squares, ids = answer.distances.cpu(), answer.ids.cpu()
            near = (squares <= limit) & (ids >= 0)
            row, column = near.nonzero(as_tuple=True)
            view, number = asked[row] // max(1, len(numbers)), numbers[asked[row] % max(1, len(numbers))]
            parts.append(torch.stack([number, ids[row, column], squares[row, column].view(torch.int64), view], dim=1))
            pairs = sum(map(len, parts))
            work.ranks.collect(InputError(MANY) if pairs > MOST_PAIRS else None)
            again += [asked[near[:, -1]]] if limit < math.inf and k < candidates.count else []
        left, k = torch.cat(again), min(NEIGHBOURS * k, candidates.count)
    return torch.cat(parts)


def firsts(table: Tensor, columns: int) -> Tensor:
    """Of the rows (n, c) that agree in their first columns the least, in lexical order."""
    table = table[sort_lexically(*table.T.contiguous())]
    again = (table[1:, :columns] == table[:-1, :columns]).all(1)
    return torch.cat([table[:1], table[1:][~again]])
