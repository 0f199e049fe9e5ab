"""What each configuration costs in arithmetic, and how long that takes at given rates.

    python benchmarks/budget.py --to benchmarks/results/budget

Multiplications and additions of f's layers, counted by torch, times the forwards that an image needs: one for each of
the pool's samples that are generated for it, and three (a forward, and a backward of twice its cost) for each input
that a term trains on. Normalisation, activation, search and reading are left out: what they cost is in the rate, which
is measured (0.18 TFLOP/s: mnist_imle_long.yaml on two cores) or supposed (100: a tenth of what an H100 is sold for in bf16).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from trained import ROOT, check_place, page, write

from pipeline.config import load
from pipeline.errors import InputError, exit_on_input_error
from pipeline.model.networks import build_network

SHAPES = {
    "mnist": (1, 28, 28),
    "mnist_imle_long": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "folder256": (3, 256, 256),
}


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the table."""

    rates: tuple[float, ...] = (0.18, 100.0)
    """TFLOP/s that are reached."""
    to: Path = Path("benchmarks/results/budget")
    """Where to write, without an ending."""


def main(settings: Settings) -> None:
    check_place(settings.to)
    if not all(0 < rate < math.inf for rate in settings.rates):
        raise InputError(f"--rates {settings.rates}: each must be above 0")
    rows, found = list[list[str]](), dict[str, dict[str, float]]()
    for name, shape in SHAPES.items():
        config = load(str(ROOT / f"configs/{name}.yaml"))
        with torch.device("meta"):
            network, image = build_network(config.model, shape), torch.empty(1, *shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
        forwards = 3 * config.objective.forwards + config.match.ratio / config.train.passes
        total = counter.get_total_flops() * forwards * config.train.images
        hours = [total / (rate * 1e12) / 3600 for rate in settings.rates]
        parameters = sum(value.numel() for value in network.parameters())
        found[name] = {"parameters": parameters, "flop": counter.get_total_flops(), "total": total}
        cells = [f"{parameters / 1e6:.1f}", f"{counter.get_total_flops() / 1e9:.3f}", f"{forwards:g}"]
        cells += [f"{config.train.images:,}", f"{total / 1e15:.2f}"]
        rows.append([name, *cells, *(f"{spent:,.2f}" for spent in hours)])
    titles = ["", "parameters, 10⁶", "GFLOP a forward", "forwards an image", "images", "PFLOP in all"]
    titles += [f"hours at {rate:g} TFLOP/s" for rate in settings.rates]
    text = page("Arithmetic of a training", titles, rows)
    write(settings.to, text, found)
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("budget"):
        main(tyro.cli(Settings))
