"""What the ranks of test_ranks.py run. Every case shares one fixed problem out among however many ranks there are."""

import time
from types import SimpleNamespace

import torch

from naign import errors
from naign.distributed.ranks import part, together
from naign.match import scan
from naign.match.matcher import MatchConfig, match_round
from naign.model.networks import ConvConfig, build_network
from naign.model.prior import LatentsConfig, build_latents
from tests.match.problems import draw


def share(rows, rank, world):
    """This rank's contiguous part and its first row."""
    start = len(rows) * rank // world
    stop = len(rows) * (rank + 1) // world
    return rows[start:stop], start


def parted(rank, world):
    """When a rank comes and when it leaves, by the machine's clock; the last comes a second later."""
    time.sleep(rank == world - 1)
    came = time.monotonic()
    part(120)
    return came, time.monotonic()


def parted_without_one(rank, world):
    """Seconds that a rank waits for the others, of whom the last does not come."""
    began = time.monotonic()
    if rank < world - 1:
        part(0.5)
    return time.monotonic() - began


def matched(rank, world):
    """A round's match by a real network: samples and so ids must not depend on who generates them."""
    torch.manual_seed(0)
    network = build_network(ConvConfig(width=8, code=16), (1, 8, 8)).eval()
    latents = build_latents(LatentsConfig(name="gaussian"), (1, 8, 8))

    @torch.inference_mode()
    def sample(ids):
        return network(latents.draw(1, 2, ids, "cpu"))

    images, _ = share(
        draw(
            7,
            360,
            1,
            8,
            8,
        ).tanh(),
        rank,
        world,
    )
    config = MatchConfig(round=360, ratio=1000 / 360, block=64)
    return match_round(images, sample, config)


def match(rank, world):
    """What must not depend on the world size: ids, distances, and all that is reported but what it cost."""
    answers = {}
    for method, least in {"flat": 10**9, "bounded": 1}.items():
        scan.LEAST_CANDIDATES = least
        scan.LEAST_DIMS = least
        found = matched(rank, world)
        values = {}
        for key, value in found.values.items():
            if key.startswith("match/") and key != "match/measured":
                values[key] = value
        answers[method] = {"ids": found.ids, "distances": found.distances, "values": values}
    return answers


class Narrower(errors.Damaged):
    """A subclass that errors.py does not know."""


RAISED = {
    "one": (None, errors.Damaged("damaged")),
    "diverged": (errors.Diverged("diverged"), None),
    "stopped": (errors.Stopped(), None),
    "a subclass of another module": (None, Narrower("narrower")),
    "2 before 75": (errors.Stopped(), errors.Damaged("damaged")),
    "75 before 76": (errors.PeerLost("lost"), errors.Stopped()),
    "76 before 1": (errors.Unavailable("out of reach"), errors.PeerLost("lost")),
    "the first rank's of two alike": (errors.InputError("wrong"), errors.Damaged("damaged")),
    "none": (None, None),
}
"""What rank 0 and rank 1 raise inside `together`."""


def raised(rank, world):
    """Name and message of what this rank got in each case."""
    found = {}
    for name, raising in RAISED.items():
        try:
            with together(SimpleNamespace(num_processes=world)):
                if (error := raising[rank]) is not None:
                    raise error
            found[name] = ("", "")
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    return found
