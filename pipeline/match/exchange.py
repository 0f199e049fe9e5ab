"""What ranks tell each other during a search: uneven rows, agreement, and the best answers to each query's owner."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch renames it


@dataclass(kw_only=True, slots=True)
class Ranks:
    """This process's place among those of a process group; one process alone where there is none."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    link: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where tensors must lie to travel: NCCL moves device memory, gloo host memory."""
    received: int = 0
    """Bytes that other ranks sent to this one so far."""

    def table(self, row: list[int]) -> Tensor:
        """Collective: every rank's row of equally many integers, (world, len(row)) int64."""
        mine = torch.tensor(row, dtype=torch.int64)
        if self.world == 1:
            return mine[None]
        out = torch.empty(self.world, len(row), dtype=torch.int64, device=self.link)
        with self._answered("agreeing on the problem"):
            _all_gather(out.view(-1), mine.to(self.link), group=self.group)
        self.received += 8 * len(row) * (self.world - 1)
        return out.cpu()

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Collective: all ranks' rows (sum(sizes), *shape) in rank order, on the device of `rows`."""
        if self.world == 1:
            return rows
        longest = max(sizes)
        padded = rows.detach().to(self.link)
        if len(rows) < longest:  # shards may be uneven: they travel padded to the longest
            padded = torch.cat([padded, padded.new_zeros(longest - len(rows), *rows.shape[1:])])
        out = torch.empty(self.world * longest, *rows.shape[1:], dtype=rows.dtype, device=self.link)
        with self._answered("sharing rows"):
            _all_gather(out, padded.contiguous(), group=self.group)
        self.received += padded.numel() * padded.element_size() * (self.world - 1)
        if any(size < longest for size in sizes):
            out = torch.cat([part[:size] for part, size in zip(out.split(longest), sizes, strict=True)])
        return out.to(rows.device)

    def deliver(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Collective: of each rank's (sum(sizes), *shape), the part of this rank: (world, sizes[rank], *shape)."""
        if self.world == 1:
            return rows[None]
        mine = sizes[self.rank]
        out = torch.empty(self.world * mine, *rows.shape[1:], dtype=rows.dtype, device=self.link)
        with self._answered("exchanging answers"):
            dist.all_to_all_single(out, rows.to(self.link).contiguous(), [mine] * self.world, sizes, group=self.group)
        self.received += out.numel() * out.element_size() * (self.world - 1) // self.world
        return out.view(self.world, mine, *rows.shape[1:]).to(rows.device)

    def broadcast(self, rows: Tensor, source: int) -> Tensor:
        """Collective: the tensor that rank `source` has; the others give one of the same shape and type."""
        if self.world == 1:
            return rows
        out = rows.detach().to(self.link).contiguous()
        with self._answered("sharing a plan"):
            origin = source if self.group is None else dist.get_global_rank(self.group, source)
            dist.broadcast(out, origin, group=self.group)
        self.received += out.numel() * out.element_size() * (self.rank != source)
        return out.to(rows.device)

    def least(self, values: Tensor) -> Tensor:
        """Collective: the least of all ranks' values, elementwise."""
        if self.world == 1:
            return values
        out = values.to(self.link).clone()
        with self._answered("sharing limits"):
            dist.all_reduce(out, dist.ReduceOp.MIN, group=self.group)
        self.received += 2 * out.numel() * out.element_size() * (self.world - 1) // self.world
        return out.to(values.device)

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of every backend, for a lost connection as for a timeout
            raise RuntimeError(
                f"nearest: rank {self.rank} of {self.world} failed while {what}: another rank died or did not answer "
                f"within the process group's timeout ({error})"
            ) from error


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """The ranks of `group`, by default of the default group."""
    if not dist.is_initialized():
        return Ranks()
    link = (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )
    return Ranks(rank=dist.get_rank(group), world=dist.get_world_size(group), group=group, link=link)
