"""What each configuration costs in arithmetic, and how long that takes at given rates.

    python benchmarks/budget.py --to benchmarks/results/budget

Multiplications and additions of f's layers, counted by torch, times the forwards that an image needs: one for each of
the pool's samples that are generated for it, and three (a forward, and a backward of twice its cost) for each input
that a term trains on; and those of the flow of codes, three for each code it learns from. Normalisation, activation,
search and reading are left out: what they cost is in the rate, which is measured (0.18 TFLOP/s: mnist_imle_long.yaml on
two cores) or supposed (100: a tenth of what an H100 is sold for in bf16).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trained import ROOT, check_place, page, write

from naign.config import load
from naign.errors import InputError, exit_on_input_error
from naign.model.networks import build_network
from naign.model.prior.flow import Flow, FlowConfig

SHAPES = {
    "mnist": (1, 28, 28),
    "mnist_imle": (1, 28, 28),
    "mnist_imle_long": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10_cpu": (3, 32, 32),
    "cifar10": (3, 32, 32),
    "photos": (3, 48, 48),
    "pictures": (3, 64, 64),
    "folder64": (3, 64, 64),
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
    rows, found = list[list[str]](), dict[str, dict[str, list[float]]]()
    for name, shape in SHAPES.items():
        config = load(str(ROOT / f"configs/{name}.yaml"))
        prior, images = config.prior, config.train.images
        with torch.device("meta"):
            network, image = build_network(config.model, shape), torch.empty(1, *shape)
        forwards = 3 * config.objective.forwards
        forwards += config.match.ratio / config.train.passes if config.objective.needs_match else 0
        fitted = images * (1 - prior.alone)
        parts, flows = [forwards * fitted * count(network, image)], list[nn.Module]()
        if isinstance(prior, FlowConfig):  # other priors cost little
            flow = Flow(prior, network.code)
            flows.append(flow.velocity)
            drawn = torch.zeros(1, *flow.noise_shape), torch.zeros(1)
            parts.append(3 * prior.passes * images * (1 - prior.begin) * count(flow.velocity, *drawn))
        hours = [sum(parts) / (rate * 1e12) / 3600 for rate in settings.rates]
        sizes = [sum(value.numel() for value in part.parameters()) for part in (network, *flows)]
        found[name] = {"parameters": sizes, "flop": parts}
        cells = [" + ".join(f"{value / 1e6:.1f}" for value in sizes), f"{forwards:g}", f"{fitted:,.0f}"]
        cells.append(" + ".join(f"{value / 1e15:.2f}" for value in parts))
        rows.append([name, *cells, *(f"{spent:,.2f}" for spent in hours)])
    titles = ["", "parameters of f + flow, 10⁶", "forwards an image", "images f learns from", "PFLOP of f + flow"]
    titles += [f"hours at {rate:g} TFLOP/s" for rate in settings.rates]
    text = page("Arithmetic of a training", titles, rows)
    write(settings.to, text, found)
    print(text)


def count(network: nn.Module, *inputs: Tensor) -> int:
    """Multiplications and additions of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return int(counter.get_total_flops())


if __name__ == "__main__":
    with exit_on_input_error("budget"):
        main(tyro.cli(Settings))
