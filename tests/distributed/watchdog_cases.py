"""What the ranks of tests/distributed/test_watchdog.py run: one waits for the other."""

import os
import signal
import time

import torch
import torch.distributed as dist

from naign.distributed.watchdog import Watchdog


def begin(rank, world, timeout):
    """A watchdog in "take" of round 12, once all ranks are there and have posted it."""
    watchdog = Watchdog(rank=rank, world=world, timeout=timeout, every=0.2)
    watchdog.__enter__()
    watchdog.enter("take", 12)
    dist.barrier()
    time.sleep(0.5)
    return watchdog


def late(rank, world):
    watchdog = begin(rank, world, 60 if rank else 2)
    if rank:
        time.sleep(60)
    watchdog.enter("match", 12)
    dist.all_reduce(torch.ones(1))


def frozen(rank, world):
    """As a host that vanished: no connection is closed."""
    watchdog = begin(rank, world, 3)
    watchdog.enter("match", 12)
    if rank:
        time.sleep(0.5)  # long enough to post it
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


def holder_killed(rank, world):
    watchdog = begin(rank, world, 2)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    watchdog.enter("match", 12)
    time.sleep(60)


def slow(rank, world):
    """Both make progress and part in good order."""
    with Watchdog(rank=rank, world=world, timeout=1, every=0.2) as watchdog:
        for round in range(3):
            watchdog.enter("fit", round)
            for _ in range(3):
                time.sleep(0.3)
                watchdog.beat()
            dist.all_reduce(torch.ones(1))
