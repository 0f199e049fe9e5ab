"""What each recipe needs: arithmetic, hours at given rates, and the memory of a step on one GPU, all computed.

    python benchmarks/budget.py --to benchmarks/results/budget

Arithmetic: the layers' multiplications and additions, counted by torch, times the forwards that an image needs: one for
each pool sample that is generated for it, and three (a forward, and a backward of twice its cost) for each input that a
term trains on; and those of the flow, three for each code it learns from. Normalisation, activation, search and reading
are left out: their cost is in the rate, which is measured (0.18 TFLOP/s: f of MNIST on two cores) or assumed
(100: a tenth of an H100's peak in bf16).

Memory: torch's MemTracker follows the tensors of two steps in bfloat16 on a device that holds no values, with CUDA's
autocast; beside it the average of the weights, where one is kept, and the images of a round in float32. Left out: the
pool, CUDA's context (half a GB), what its allocator and cuDNN's workspaces waste. Not measured on a GPU yet.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from output import ROOT, Record, check_place, page, table, write
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from naign.config import Config, load
from naign.errors import InputError, exit_on_input_error
from naign.model.losses import NaignConfig, ObjectiveConfig
from naign.model.networks import build_network
from naign.model.prior.flow import Flow, FlowConfig

sys.path.insert(0, str(ROOT))

SHAPES = {
    "mnist": (1, 28, 28),
    "mnist_imle": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10_cpu": (3, 32, 32),
    "cifar10": (3, 32, 32),
    "photos": (3, 48, 48),
    "pictures": (3, 64, 64),
    "folder64": (3, 64, 64),
    "folder256": (3, 256, 256),
}
MEMORY = ["weights, gradients, moments", "of the step besides", "average", "images of a round", "in all, GB"]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make both tables."""

    configs: tuple[str, ...] = tuple(SHAPES)
    """Recipes."""
    rates: tuple[float, ...] = (0.18, 100.0)
    """TFLOP/s that are reached."""
    to: Path = Path("benchmarks/results/budget")
    """Where to write, without an ending."""


def main(settings: Settings) -> None:
    check_place(settings.to)
    if not all(0 < rate < math.inf for rate in settings.rates):
        raise InputError(f"--rates {settings.rates}: each must be above 0")
    if not settings.configs or set(settings.configs) - set(SHAPES):
        raise InputError(f"--configs {' '.join(settings.configs)}: give some of {', '.join(SHAPES)}")
    from tests import pretend

    device = pretend.device()
    found: dict[str, Record] = {}
    for name in settings.configs:
        config = load(str(ROOT / f"configs/{name}.yaml"))
        found[name] = arithmetic(config, SHAPES[name])
        found[name]["gigabytes"] = memory(config, SHAPES[name], device)
        if name == "folder256":
            config.train.recompute = True
            again = memory(config, SHAPES[name], device)
            found[f"{name} --train.recompute"] = {"gigabytes": again}
    text = page_of(found, settings.rates)
    write(settings.to, text, found)
    print(text)


def forwards_of(objective: ObjectiveConfig) -> int:
    """Forwards of f per image and pass, each with a backward."""
    if not isinstance(objective, NaignConfig):
        return 1 + objective.needs_latents
    terms = (
        objective.reconstruction > 0,
        objective.needs_latents,
        objective.third != "none",
        objective.needs_damaged,
    )
    return sum(terms)


def arithmetic(config: Config, shape: tuple[int, ...]) -> Record:
    """Parameters and floating-point operations of f, and of the flow if there is one."""
    prior = config.prior
    images = config.train.images
    with torch.device("meta"):
        network = build_network(config.model, shape)
        image = torch.empty(1, *shape)
    forwards = 3 * forwards_of(config.objective)
    if config.objective.needs_match:
        forwards += config.match.ratio / config.train.passes
    fitted = images
    parts = [network]
    flop = [forwards * fitted * count(network, image)]
    if isinstance(prior, FlowConfig):  # other priors cost little
        flow = Flow(prior, network.code)
        parts.append(flow.velocity)
        codes = prior.passes * prior.images
        noise = torch.zeros(1, *flow.noise_shape)
        flop.append(3 * codes * count(flow.velocity, noise, torch.zeros(1)))
    return {
        "parameters": [size_of(part) for part in parts],
        "forwards": forwards,
        "images": fitted,
        "flop": flop,
    }


def size_of(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(value.numel() for value in network.parameters())


def count(network: nn.Module, *inputs: Tensor) -> int:
    """Multiplications and additions of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return int(counter.get_total_flops())


def memory(
    config: Config,
    shape: tuple[int, ...],
    device: torch.device,
) -> list[float]:
    """GB of a step, in parts as MEMORY names them."""
    micro = config.train.batch // config.train.accumulate
    with FakeTensorMode():
        with device:
            network = build_network(
                config.model,
                shape,
                recompute=config.train.recompute,
            )
            images = torch.empty(micro, *shape)
        adam = torch.optim.AdamW(network.parameters(), foreach=True)
        tracker = MemTracker()
        tracker.track_external(network, adam)
        with tracker:
            for _ in range(2):  # moments exist after the first step
                step(network, images, forwards_of(config.objective), tracker)
                adam.step()
                adam.zero_grad()
    total = tracker.get_tracker_snapshot("peak")[device]["Total"]
    weights = 4 * size_of(network)
    average = weights if config.train.ema else 0
    of_round = 4 * config.match.round * math.prod(shape)
    parts = [
        4 * weights,
        total - 4 * weights,
        average,
        of_round,
        total + average + of_round,
    ]
    return [value / 1e9 for value in parts]


def step(
    network: nn.Module,
    images: Tensor,
    forwards: int,
    tracker: MemTracker,
) -> None:
    """Forward and backward of as many inputs an image as the objective has terms."""
    inputs = torch.cat([images] * forwards)
    targets = inputs.clone()
    tracker.reset_mod_stats()  # of a module it follows one call, unless it is told to begin again
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        made = network(inputs).float()
        loss = (made - targets).abs().mean()
    loss.backward()


def page_of(found: dict[str, Record], rates: tuple[float, ...]) -> str:
    """Both tables."""
    rows = []
    for name, row in found.items():
        if "flop" not in row:
            continue
        cells = [
            " + ".join(f"{value / 1e6:.1f}" for value in row["parameters"]),
            f"{row['forwards']:g}",
            f"{row['images']:,.0f}",
            " + ".join(f"{value / 1e15:.2f}" for value in row["flop"]),
        ]
        cells += [f"{sum(row['flop']) / (rate * 1e12) / 3600:,.2f}" for rate in rates]
        rows.append([name, *cells])
    titles = [
        "",
        "parameters of f + flow, 10⁶",
        "forwards an image",
        "images f learns from",
        "PFLOP of f + flow",
        *(f"hours at {rate:g} TFLOP/s" for rate in rates),
    ]
    text = page("Arithmetic of a training", titles, rows)
    sizes = []
    for name, row in found.items():
        sizes.append([name, *(f"{value:.2f}" for value in row["gigabytes"])])
    return f"{text}\nMemory of a step on one GPU, GB\n\n{table(['', *MEMORY], sizes)}\n"


if __name__ == "__main__":
    with exit_on_input_error("budget"):
        main(tyro.cli(Settings))
