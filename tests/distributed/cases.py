"""What the ranks of test_ranks.py run. Every case shares one fixed problem out among however many ranks there are."""

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.match import latents
from pipeline.match.matcher import match_round
from pipeline.match.nearest import nearest
from pipeline.model.networks import NetworkConfig, build_network


def share(rows: Tensor, rank: int, world: int) -> tuple[Tensor, int]:
    """This rank's contiguous part and its first row."""
    start, stop = len(rows) * rank // world, len(rows) * (rank + 1) // world
    return rows[start:stop], start


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def searched(queries: Tensor, candidates: Tensor, rank: int, world: int) -> dict[str, Tensor]:
    mine, _ = share(queries, rank, world)
    pool, first = share(candidates, rank, world)
    distances, ids = nearest(mine, pool, first)
    return {"distances": distances, "ids": ids}


def search(rank: int, world: int) -> dict[str, Tensor]:
    return searched(draw(0, 901, 50), draw(1, 4001, 50), rank, world)


def near_duplicates(rank: int, world: int) -> dict[str, Tensor]:
    base = draw(2, 500, 64)
    pool = torch.cat([base, base + 1e-7 * draw(3, 500, 64), base[:100], base]) + 100
    return searched(base[:400] + 0.2 * draw(4, 400, 64) + 100, pool, rank, world)


def uneven(rank: int, world: int) -> dict[str, Tensor]:
    """The last rank has every candidate and the first every query; there are fewer of either than ranks like."""
    queries, pool = draw(5, 300, 12), draw(6, 5, 12)
    mine = queries if rank == 0 else queries[:0]
    candidates = pool if rank == world - 1 else pool[:0]
    distances, ids = nearest(mine, candidates, 0)
    return {"distances": distances, "ids": ids}


def match(rank: int, world: int) -> dict[str, Tensor]:
    """A round's match by a real network: samples and so ids must not depend on who generates them."""
    torch.manual_seed(0)
    network = build_network(NetworkConfig(width=8, code=16), (1, 12, 12)).eval()

    @torch.inference_mode()
    def sample(ids: Tensor) -> Tensor:
        return network(latents.draw("mixture", 1, 2, ids, (1, 12, 12)))

    images, _ = share(draw(7, 360, 1, 12, 12).tanh(), rank, world)
    found = match_round(images, sample, pool=1000, block=64, rank=rank, world=world)
    return {"distances": found.distances, "ids": found.ids}


def refused(rank: int, world: int) -> dict[str, str]:
    messages = {}
    pool = draw(0, 4, 3)
    for name, candidates in (("nan", pool / pool.new_tensor(float(1 - rank))), ("none", pool[:0])):
        try:
            nearest(draw(1, 5, 3), candidates * (0 if name == "nan" and rank else 1), 0)
        except InputError as error:
            raise AssertionError("a fault of the program is no InputError") from error
        except ValueError as error:
            messages[name] = str(error)
    return messages
