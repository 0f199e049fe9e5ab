"""Where ranks talk: what they sum, gather and agree on, errors that they share, and how the loss of one shows.

The match has its own exchange, in match/exchange.py, and DDP and DeepSpeed theirs, in engine.py and zero.py. Muon
broadcasts its changes; other broadcasts are Accelerate's. signals.py uses the ranks' store, watchdog.py no other rank.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed import distributed_c10d as c10d

from naign.errors import BY_WEIGHT, SHARED, PeerLost, printable

T = TypeVar("T")


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Context, collective: an error of `errors.SHARED` that one rank raises inside is raised on every rank, so that no
    rank waits in vain. A subclass arrives as the nearest of them. Of several, the one with the most specific exit code
    wins (`errors.BY_WEIGHT`), then that of the lowest rank.
    """
    mine: Any = None
    try:
        yield
    except SHARED as error:
        known = [kind for kind in type(error).__mro__ if kind in SHARED]
        mine = known[0](str(error))
    gathered = [mine] * accelerator.num_processes
    if accelerator.num_processes > 1:
        dist.all_gather_object(gathered, mine)
    failures = [failure for failure in gathered if failure]
    if failures:
        raise min(failures, key=lambda failure: BY_WEIGHT.index(failure.code))


def total(values: list[float], accelerator: Accelerator) -> list[float]:
    """Collective: each value summed over the ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return list(accelerator.reduce(tensor).tolist())


class SideGroup:
    """A gloo group of all ranks beside the default one, for another thread or another timeout. Collective."""

    def __init__(self, world: int, *, timeout: float) -> None:  # seconds that ranks wait for each other
        self._world = world
        self._group: Any = None
        if world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def gather(self, value: T) -> list[T]:
        """Collective: the object of each rank."""
        values = [value] * self._world
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def largest(self, *values: float) -> list[float]:
        """Collective: the largest of each value on any rank; cheaper than `gather`, which pickles."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()


LOST = (  # parts of messages of gloo and NCCL about a rank that is gone
    "Connection closed by",
    "closed by remote peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "connectFullMesh failed",
    "Timed out waiting",
)
NCCL_LOST = (*LOST, "ncclRemoteError", "ncclSystemError", "collective operation timeout", "was aborted")
OF_THIS_RANK = (  # parts of messages about a fault of this rank or its host, which a restart would not fix
    "ncclInvalidUsage",
    "ncclInvalidArgument",
    "ncclUnhandledCudaError",
    "unhandled cuda error",
    "out of memory",
    "shared memory",
    "No space left",
    "failed to listen",
)


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective or the store failed because another rank is gone, or silent for too long."""
    text = str(error)
    if not isinstance(error, RuntimeError) or any(sign in text for sign in OF_THIS_RANK):
        return False
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):  # of the store, which is rank 0's
        return True
    signs = NCCL_LOST if isinstance(error, dist.DistBackendError) else LOST
    return any(sign in text for sign in signs)


@contextmanager
def peers_missed() -> Iterator[None]:
    """Turn what a collective raises when another rank is gone into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        message = str(error).partition("\nException raised from")[0]  # the rest is a stack
        reason = printable(" ".join(message.split()), 400)
        rank = os.environ.get("RANK", "0")
        raise PeerLost(f"rank {rank} lost another rank, and ends ({reason})") from error


def part(seconds: float = 10.0) -> None:
    """Wait, for `seconds` at most, until every rank calls this: then none closes its connections while another still
    receives the last collective's result. By the store, since a barrier is a collective; rank 0 has it, so ends last.
    """
    if not dist.is_initialized():
        return
    rank = dist.get_rank()
    store = c10d.PrefixStore("part", c10d._get_default_store())
    with suppress(RuntimeError):  # another rank has left already
        for sign in ("arrived", "leaving"):
            store.set(f"{sign}/{rank}", "")
            if sign == "arrived" or rank == 0:
                of_all = [f"{sign}/{other}" for other in range(dist.get_world_size())]
                store.wait(of_all, timedelta(seconds=seconds))
