"""Codes for priors to be fitted to: in memory, or on ranks, which are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from naign.model.prior import Codes


def in_memory(codes, labels=None):
    """Codes on one rank."""
    return Codes(sizes=(len(codes),), read=lambda chunk: ([codes], labels))


def fit_on_ranks(priors, codes):
    """Fit one prior a rank, each with its part of the codes and with sums over all, as a reduction gives them."""
    world = len(priors)
    barrier = threading.Barrier(world)
    parts = {}

    def fit(rank):
        def add(value):
            parts[rank] = value
            barrier.wait(30)
            whole = torch.stack([parts[other] for other in range(world)]).sum(0)
            barrier.wait(30)
            return whole

        of_rank = Codes(
            sizes=(len(codes),),
            read=lambda _: ([codes], None),
            rank=rank,
            world=world,
            add=add,
        )
        list(priors[rank].fit(of_rank))

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(fit, range(world)))
