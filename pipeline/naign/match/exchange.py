"""Communication of a search: agreement, rows of uneven shards, and answers to the rank that asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from naign.errors import one_line

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch renames it

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class Ranks:
    """This process's rank in a process group; without a group, a single process. All methods are collective."""

    rank: int = 0
    world: int = 1
    first: int = 0  # the rank, among all, of the first of these
    group: dist.ProcessGroup | None = None
    link: torch.device = torch.device("cpu")  # where tensors must lie to be sent: on the GPU for NCCL, else on the CPU

    def collect(self, value: T | Exception) -> list[T]:
        """Every rank's value. If any is an exception, the first of them is raised on every rank."""
        values = [value] * self.world
        if self.world > 1:
            with self._exchange("agreeing"):
                dist.all_gather_object(values, value, group=self.group)
        for each in values:
            if isinstance(each, Exception):
                raise each
        return cast(list[T], values)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What the work returns on each rank. An exception of any of them is raised on all."""
        done: T | Exception
        try:
            done = work()
        except Exception as error:
            done = error
            if not type(error).__module__.startswith(("builtins", "naign.")):  # others may not be sent
                done = RuntimeError(f"rank {self.rank}: {type(error).__name__}: {one_line(error)}")
        return self.collect(done)

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """All ranks' rows (sum(sizes), *shape) in rank order, on the device of `rows` (sizes[rank], *shape)."""
        if self.world == 1:
            return rows
        longest = max(sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:], device=self.link)
        padded[: len(rows)] = rows.detach()
        out = padded.new_empty(self.world * longest, *rows.shape[1:])
        with self._exchange("sharing rows"):
            _all_gather(out, padded, group=self.group)
        if min(sizes) < longest:
            parts = zip(out.split(longest), sizes, strict=True)
            out = torch.cat([part[:size] for part, size in parts])
        return out.to(rows.device)

    def deliver(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """This rank's part of each rank's rows (sum(sizes), *shape): (world, sizes[rank], *shape)."""
        if self.world == 1:
            return rows[None]
        mine = sizes[self.rank]
        out = rows.new_empty(
            self.world * mine,
            *rows.shape[1:],
            device=self.link,
        )
        with self._exchange("exchanging answers"):
            dist.all_to_all_single(
                out,
                rows.to(self.link).contiguous(),
                [mine] * self.world,
                sizes,
                group=self.group,
            )
        return out.view(self.world, mine, *rows.shape[1:]).to(rows.device)

    def least(self, values: Tensor) -> Tensor:
        """The elementwise minimum over the ranks."""
        if self.world == 1:
            return values
        out = values.to(self.link).clone()
        with self._exchange("sharing limits"):
            dist.all_reduce(out, dist.ReduceOp.MIN, group=self.group)
        return out.to(values.device)

    def mean(self, values: list[float]) -> list[float]:
        """The mean over the ranks of each value."""
        if self.world == 1:
            return values
        out = torch.tensor(values, dtype=torch.float64, device=self.link)
        with self._exchange("sharing metrics"):
            dist.all_reduce(out, group=self.group)
        return list((out / self.world).tolist())

    @contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        """Say what another rank's death interrupted."""
        try:
            yield
        except RuntimeError as error:  # every backend raises it, for a lost connection and for a timeout
            cause = f"another rank died or did not answer within the process group's timeout ({error})"
            raise RuntimeError(f"nearest: rank {self.rank} of {self.world} failed while {what}: {cause}") from error


def nearby_ranks(span: int) -> Ranks:
    """This rank among the `span` that share a group of images: the first of all ranks, the next, and so on. Collective
    at its first call; `span` divides the number of ranks.
    """
    everyone = ranks_of(None)
    if span == everyone.world:
        return everyone
    first = everyone.rank // span * span
    if span == 1:
        return Ranks(first=first)
    ranks = ranks_of(_new_group(dist.group.WORLD, first, span))
    ranks.first = first
    return ranks


@cache
def _new_group(world: dist.ProcessGroup, first: int, span: int) -> dist.ProcessGroup:
    """The ranks [first, first + span) of `world`, with its timeout. Collective over these alone."""
    backend = world._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"))
    members = list(range(first, first + span))
    mine: dist.ProcessGroup = dist.new_group(members, timeout=backend.options._timeout, use_local_synchronization=True)
    return mine


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """The ranks of `group`; None: of the default group, or a single process where there is none."""
    if not dist.is_initialized():
        return Ranks()
    link = torch.device("cpu")
    if dist.get_backend(group) == "nccl":
        link = torch.device("cuda", torch.cuda.current_device())
    return Ranks(
        rank=dist.get_rank(group),
        world=dist.get_world_size(group),
        group=group,
        link=link,
    )
