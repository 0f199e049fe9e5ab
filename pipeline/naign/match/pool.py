"""The samples of a round, which are generated in blocks of ids while they are searched."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from naign.data.order import parts
from naign.match.exchange import Ranks
from naign.match.index import Blocks

HELD_ROWS = 4096
HELD_VALUES = 2**26
"""Samples, and float32 values, of the pool in memory at once: at most these, but at least one block."""


def block_range(
    pool: int,
    block: int,
    rank: int,
    world: int,
) -> tuple[int, int]:
    """The ids [first, last) of the pool that `rank` generates: whole blocks, shared out evenly."""
    first, last = parts(0, -(-pool // block), world)[rank]
    return min(pool, first * block), min(pool, last * block)


class Pool:
    """This rank's part of a pool: the samples with ids from `first` on."""

    def __init__(
        self,
        start: int,  # the pool's first id
        size: int,  # samples of all ranks
        block: int,  # samples generated at once
        sample: Callable[[Tensor], Tensor],  # as in match_round
        poll: Callable[[], None],  # as in match_round
        dims: int,  # values of a sample
        ranks: Ranks,
    ) -> None:
        spans = [block_range(size, block, rank, ranks.world) for rank in range(ranks.world)]
        first, last = spans[ranks.rank]
        self.first = start + first
        self.rows = last - first
        self._longest = max(last - first for first, last in spans)
        self._block = block
        self._size = max(1, min(HELD_ROWS, HELD_VALUES // dims) // block) * block
        self._sample = sample
        self._poll = poll
        self._made = 0  # samples of the rank with most
        self.polled_out = False  # whether `poll` has raised, on all ranks
        self.failed = False  # whether `sample` has, on this one

    def skip(self) -> None:
        """Poll, and sample in vain, as often as the other ranks still do."""
        for _ in range(self._made, self._longest, self._block):
            self._look()
            with contextlib.suppress(Exception):
                self._sample(torch.arange(1))

    def _look(self) -> None:
        try:
            self._poll()
        except Exception:
            self.polled_out = True
            raise

    def blocks(self) -> Blocks:
        """The samples as candidates of a search."""
        return Blocks(rows=self.rows, make=self._make, size=self._size)

    def _make(self, low: int, high: int) -> Tensor:
        """This rank's samples [low, high). Every rank polls and samples as often as the one with most blocks: both may
        be collective, sampling where a rank holds a part of the weights. A rank whose sampling fails goes on polling.
        """
        # `low` is the same on every rank: they differ by one block at most, the last one of the last part.
        end = min(self._longest, low + self._size)
        self._made = end
        samples = []
        failure = None
        for start in range(low, end, self._block):
            self._look()
            if failure is not None:
                continue
            ids = torch.arange(1)
            if start < high:
                stop = min(start + self._block, high)
                ids = torch.arange(self.first + start, self.first + stop)
            try:
                samples.append(self._sample(ids))
            except Exception as error:
                failure = error
        if failure is not None:
            self.failed = True
            raise failure
        return torch.cat(samples)[: high - low].float().flatten(1)
