"""Images as rows of values that are compared, in blocks that are the same for every number of ranks. Each rank makes
the blocks of its part once, and keeps them as files (work.py): every block of queries is compared with all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import require
from pipeline.match import Blocks, SpaceConfig
from pipeline.match.matcher import block_range
from pipeline.match.space import ROWS, embed
from pipeline.model.encoders import Encoder, open_encoder
from pipeline.model.scale import scaled
from pipeline.neighbours.work import Work

PIXELS = "pixels"  # the name of no encoder: values are compared as they are
MOST, VALUES = 4096, 2**24
"""Rows of a block, and its float32 values: at most these, but at least ROWS rows."""
ASKED = 2**25  # float32 values of the queries of a search, unless those of one block are more


@dataclass(kw_only=True)
class Space:
    """What images are compared by. Distances are the root mean square difference of pixels, in levels of 0 to 255, or
    of a point's coordinates; of features the length of the difference of unit vectors, from 0 to 2.
    """

    shape: tuple[int, ...]  # of an image or point
    encoder: Encoder | None = None  # None: the values themselves
    device: torch.device

    def __post_init__(self) -> None:
        self.views = 2 if len(self.shape) == 3 else 1  # an image as it is, and mirrored
        values = torch.Size(self.shape).numel()
        self.dims = values
        if self.encoder:
            self.dims = self._features(torch.zeros(1, *self.shape)).shape[1]
        self.scale = values / self.dims if self.encoder else values  # squared distance of rows for a distance of 1
        self.size = max(ROWS, min(MOST, VALUES // max(values, self.dims)) // ROWS * ROWS)

    def values(self, images: Tensor, number: int) -> Tensor:
        """What is kept of stored images (n, *shape), the first of them being `number`: the images, or the features of
        both views (2, n, d) float32.
        """
        if not self.encoder:
            return images
        config, views = SpaceConfig(pixels=0.0, features=1.0, encoder=self.encoder.name), (images, images.flip(-1))
        return torch.stack([embed(scaled(view), config, self._features, number=number) for view in views])

    def rows(self, values: Tensor) -> Tensor:
        """Rows (views, n, d) float32 of what `values` returned. Pixels stay whole numbers, so their sums are exact."""
        if self.encoder:
            return values
        views = (values, values.flip(-1))[: self.views]
        return torch.stack([view.flatten(1).float() for view in views])

    def distance(self, squares: Tensor) -> Tensor:
        """Distances, of squared distances of rows."""
        return (squares / self.scale).sqrt()

    def _features(self, images: Tensor) -> Tensor:
        assert self.encoder is not None
        return F.normalize(self.encoder.features(images).float())


def open_space(encoder: str, shape: tuple[int, ...], device: torch.device) -> Space:
    """Pixels, or the features of the encoder of that name. InputError where it does not fit data of that shape."""
    opened = None if encoder == PIXELS else open_encoder("--encoder", encoder, shape, device)
    require((opened is None or len(shape) == 3, f"--encoder {encoder} is for images, these are points: leave it out"))
    return Space(shape=shape, encoder=opened, device=device)


class Rows:
    """The rows of `count` images. This rank has those of [first, last), which are whole blocks."""

    def __init__(self, name: str, count: int, read: Callable[[int, int], Tensor], space: Space, work: Work) -> None:
        """`read(first, last)` returns stored images (n, *shape)."""
        self.name, self.count, self.space, self._read, self._work = name, count, space, read, work
        self.first, self.last = block_range(count, space.size, work.ranks.rank, work.ranks.world)
        self._group = max(1, ASKED // (space.views * space.dims * space.size)) * space.size  # images
        self.groups = -(-count // self._group)
        self.blocks = -(-(self.last - self.first) // space.size)  # of this rank

    def make(self) -> None:
        """Make and keep the blocks of this rank that an interrupted audit has not kept. Raises what reading raises."""
        with self._work.bar(f"reading {self.name}", self.blocks) as bar:
            for low in range(self.first, self.last, self.space.size):
                if not self._work.has(part := self._part(low)):
                    images = self._read(low, min(low + self.space.size, self.count))
                    self._work.keep(part, values=self.space.values(images, low))
                bar.update()

    def candidates(self, bar: "tqdm[Any]") -> Blocks:
        """Of this rank, for a search; the first has the id `first`. Each block advances the bar."""

        def make(low: int, high: int) -> Tensor:
            bar.update()
            return self._block(self.first + low)[0] if low < high else torch.empty(0, self.space.dims)

        return Blocks(rows=self.last - self.first, make=make, size=self.space.size)

    def queries(self, group: int) -> tuple[Tensor, Tensor]:
        """This rank's images of a group: numbers (n,) int64, and rows (views, n, d) float32."""
        low, high = (min(max(edge * self._group, self.first), self.last) for edge in (group, group + 1))
        empty = torch.empty(self.space.views, 0, self.space.dims)
        rows = torch.cat([empty, *(self._block(start) for start in range(low, high, self.space.size))], dim=1)
        return torch.arange(low, high), rows.to(self.space.device)

    def _part(self, low: int) -> str:
        return f"{self.name}-{low // self.space.size:06d}"

    def _block(self, low: int) -> Tensor:
        return self.space.rows(self._work.load(self._part(low))["values"])


Step = Callable[[Tensor, Tensor, Callable[[], Blocks]], Tensor]
"""Step(numbers, rows, candidates) -> (m, 3) int64 of this rank's queries: numbers (n,), rows (views, n, d)."""


def compare(queries: Rows, candidates: Rows, work: Work, step: Step) -> Tensor:
    """Collective: what `step` returns for each group of the queries, of all ranks, (m, 3) int64 on rank 0; elsewhere
    empty. Finished groups are kept.
    """
    ranks, parts = work.ranks, [torch.empty(0, 3, dtype=torch.int64)]
    with work.bar(f"comparing {queries.name}", queries.groups * candidates.blocks) as bar:
        for group in range(queries.groups):
            part = f"compared-{queries.name}-{group:06d}"
            if not ranks.broadcast(ranks.rank == 0 and work.has(part), 0):
                mine = step(*queries.queries(group), lambda: candidates.candidates(bar))
                every = ranks.gather(mine, ranks.collect(len(mine)))
                if ranks.rank == 0:
                    work.keep(part, found=every)
            if ranks.rank == 0:
                parts.append(work.load(part)["found"])
    return torch.cat(parts)
