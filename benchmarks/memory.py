"""The memory that a fit step of each configuration takes on one GPU, computed without one.

    python benchmarks/memory.py --to benchmarks/results/memory

torch's MemTracker follows the tensors of two steps in bfloat16 that are not computed: forward, losses, backward and
AdamW, on a device that only exists for that, with CUDA's autocast. Beside it lie the average of the weights, where one
is kept, and the images of a round in float32. Left out: the match's pool, CUDA's own context (about half a GB), what
its allocator and cuDNN's workspaces waste. Not measured on a card yet.
"""

import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import tyro
from budget import SHAPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from trained import ROOT, check_place, page, write

from naign.config import Config, load
from naign.errors import InputError, exit_on_input_error
from naign.model.losses import Batch, Network, choose_distance, compute_losses
from naign.model.networks import build_network
from naign.model.prior import PriorConfig, build_prior
from naign.training.round import RoundRandom

sys.path.insert(0, str(ROOT))

from tests import pretend  # noqa: E402

TITLES = ["weights, gradients, moments", "of the step besides", "average", "images of a round", "in all, GB"]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the table."""

    configs: tuple[str, ...] = tuple(SHAPES)
    """Which."""
    to: Path = Path("benchmarks/results/memory")
    """Where to write, without an ending."""


def main(settings: Settings) -> None:
    check_place(settings.to)
    if not settings.configs or set(settings.configs) - set(SHAPES):
        raise InputError(f"--configs {' '.join(settings.configs)}: give some of {', '.join(SHAPES)}")
    device, found = pretend.device(), dict[str, dict[str, list[float]]]()
    for name in settings.configs:
        config = load(str(ROOT / f"configs/{name}.yaml"))
        found[name] = {"gigabytes": estimate(config, SHAPES[name], device)}
        if name == "folder256":
            recompute = replace(config, train=replace(config.train, recompute=True))
            found[f"{name} --train.recompute"] = {"gigabytes": estimate(recompute, SHAPES[name], device)}
    rows = [[name, *(f"{value:.2f}" for value in row["gigabytes"])] for name, row in found.items()]
    text = page("Memory of a fit step on one GPU, computed", ["", *TITLES], rows)
    write(settings.to, text, found)
    print(text)


def estimate(config: Config, shape: tuple[int, ...], device: torch.device) -> list[float]:
    """GB of the step in parts as TITLES has them."""
    config = replace(config, prior=PriorConfig(name="gaussian"))  # codes are decoded, which costs as little
    micro = config.train.batch // config.train.accumulate
    with FakeTensorMode():
        with device:
            network: Any = build_network(config.model, shape, recompute=config.train.recompute)
            prior = build_prior(config.prior, shape, network)
        adam = torch.optim.AdamW(network.parameters(), foreach=True)
        random = RoundRandom(config, 0, shape, device, prior)
        tracker = MemTracker()
        tracker.track_external(network, adam)
        with tracker:

            def forward(x: torch.Tensor) -> torch.Tensor:
                tracker.reset_mod_stats()  # of a module it follows one call, unless it is told to begin again
                found: torch.Tensor = network(x)
                return found

            for _ in range(2):  # moments are there from the first one on
                step(config, network, forward, random, torch.empty(micro, *shape, device=device))
                adam.step()
                adam.zero_grad()
    ((_, peak),) = ((where, parts) for where, parts in tracker.get_tracker_snapshot("peak").items() if where == device)
    total, weights = peak["Total"], 4 * sum(value.numel() for value in network.parameters())
    average = weights if config.train.ema else 0
    images = 4 * config.match.round * prod(shape)
    parts = [4 * weights, total - 4 * weights, average, images, total + average + images]
    return [value / 1e9 for value in parts]


def step(config: Config, network: Any, forward: Network, random: RoundRandom, images: torch.Tensor) -> None:
    """Forward and backward of a micro-batch."""
    rows, objective = torch.arange(len(images), device=images.device), config.objective
    batch = Batch(
        images=images,
        latents=random.latents(rows) if objective.needs_latents else None,
        damaged=random.damaged(images, rows) if objective.needs_damaged else None,
        distance=choose_distance(objective, None),
        frozen=network,
        normals=lambda step: random.normals(rows, step),
    )
    with torch.autocast(pretend.NAME, dtype=torch.bfloat16):
        total = compute_losses(objective, forward, batch)["total"]
    total.backward()


if __name__ == "__main__":
    with exit_on_input_error("memory"):
        main(tyro.cli(Settings))
