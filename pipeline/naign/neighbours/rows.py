"""Images as rows of values, in blocks that are the same for every number of ranks, and the nearest row of each.

Each rank makes the blocks of its part once, and keeps them in a temporary file: all queries are compared with all
candidates.
"""

import math
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from naign.errors import InputError
from naign.match import Blocks, search
from naign.match.exchange import Ranks
from naign.match.pool import block_range
from naign.terminal import counted

VIEWS = 2  # an image as it is, and mirrored
ROWS = 256
MOST = 4096
VALUES = 2**24
"""Rows of a block, and its float32 values: at most these, but at least ROWS rows."""
ASKED = 2**25  # float32 values of the queries of a search, of all ranks, unless those of one block are more


class ImageRows:
    """The rows of `count` images. This rank has those of [first, last), which are whole blocks."""

    def __init__(
        self,
        name: str,
        count: int,
        read: Callable[[int, int], Tensor],
        shape: tuple[int, ...],
        ranks: Ranks,
    ) -> None:
        """Make this rank's blocks; `read(first, last)` returns stored images (n, *shape) uint8."""
        self.name = name
        self.shape = shape
        self.dims = math.prod(shape)
        most = min(MOST, VALUES // self.dims)
        self.size = max(ROWS, most // ROWS * ROWS)  # rows of a block
        self.first, self.last = block_range(
            count,
            self.size,
            ranks.rank,
            ranks.world,
        )
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with this object)
        with counted(f"reading {name}", total=self.last - self.first, unit="image", shown=ranks.rank == 0) as bar:
            for low in range(self.first, self.last, self.size):
                high = min(low + self.size, count)
                values = read(low, high)
                try:
                    values.numpy().tofile(self._file)
                except OSError as error:
                    place = f"{tempfile.gettempdir()}: {error.strerror or error}"
                    raise InputError(f"{place}: set TMPDIR to a folder with more space") from None
                bar.update(high - low)

    def block(self, low: int, high: int) -> Tensor:
        """Rows (VIEWS, n, d) float32 of images [low, high) of this rank: whole numbers, so that distances are exact."""
        count = high - low
        self._file.seek((low - self.first) * self.dims)
        values = np.fromfile(self._file, np.uint8, count * self.dims)
        images = torch.from_numpy(values).view(count, *self.shape)
        views = torch.stack([images, images.flip(-1)])
        return views.flatten(2).float()

    def candidates(self) -> Blocks:
        """This rank's images as they are, for a search."""

        def make(low: int, high: int) -> Tensor:
            return self.block(self.first + low, self.first + high)[0]

        return Blocks(
            rows=self.last - self.first,
            make=make,
            size=self.size,
        )


class Nearest(NamedTuple):
    """The nearest candidate of each query, by the query's number."""

    distances: Tensor  # (q,) float64: root mean square difference of pixels, in levels of 0 to 255
    candidates: Tensor  # (q,) int64
    mirrored: Tensor  # (q,) bool: whether the query is nearer mirrored


def find_nearest(
    queries: ImageRows,
    candidates: ImageRows,
    ranks: Ranks,
    device: torch.device,
) -> Nearest:
    """Collective: the nearest candidate of each query, which is also mirrored; the first by (distance, number)."""
    values = VIEWS * queries.dims * queries.size  # of a block
    blocks = max(1, ASKED // (values * ranks.world))
    step = blocks * queries.size
    sizes = ranks.collect(queries.last - queries.first)
    most = max(sizes)
    distances = []
    numbers = []
    mirrored = []
    with counted(f"comparing {queries.name}", total=most, unit="image", shown=ranks.rank == 0) as bar:
        for start in range(0, most, step):
            low = min(queries.first + start, queries.last)
            high = min(low + step, queries.last)
            rows = queries.block(low, high).to(device)
            result = search(rows.flatten(0, 1), candidates.candidates(), candidates.first)
            straight, turned = result.distances.cpu().view(VIEWS, -1)
            number, other = result.ids.cpu().view(VIEWS, -1)
            is_turned = (turned < straight) | (turned == straight) & (other < number)
            distances.append(torch.where(is_turned, turned, straight))
            numbers.append(torch.where(is_turned, other, number))
            mirrored.append(is_turned)
            bar.update(step)
    squares = ranks.gather(torch.cat(distances), sizes)
    return Nearest(
        (squares / queries.dims).sqrt(),
        ranks.gather(torch.cat(numbers), sizes),
        ranks.gather(torch.cat(mirrored), sizes),
    )
