"""Fit steps on tensors that only claim to be on a device: what mixes devices, waits for the device, or uploads.

    python -m tests.training.card

prints a line for each case. A process of its own: it registers a device with torch.
"""

import sys
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import Config, parse
from pipeline.model.losses import Batch, choose_distance, compute_losses
from pipeline.model.networks import build_network
from pipeline.model.prior import build_prior
from pipeline.training.round import RoundRandom
from tests import pretend
from tests.conftest import ROOT

NO_LAUNCH = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "alias", "device")
HOST_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class Watch(TorchDispatchMode):
    """Counts operations, and notes what a real device would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.problems = Counter[str](), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        tensors = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, torch.Tensor)]
        if len({value.device for value in tensors if value.ndim}) > 1:
            self.problems.append(f"{name} of tensors on several devices")
        if name in HOST_READS and any(value.device.type != "cpu" for value in tensors):
            self.problems.append(f"{name} waits for the device")
        found = func(*args, **(kwargs or {}))
        if not func.is_view and name not in NO_LAUNCH:
            self.launches[name] += 1
        made = [value for value in tree_leaves(found) if isinstance(value, torch.Tensor)]
        if name == "_to_copy" and tensors[0].device != made[0].device:
            self.problems.append(f"a copy of {tuple(tensors[0].shape)} to {made[0].device.type}")
        return found


def step(config: Config, shape: tuple[int, ...], device: torch.device) -> Watch:
    """Random numbers, forward, backward and clipping of one micro-batch, as `fit` does them."""
    with device:
        network: Any = build_network(config.model, shape)
        prior = build_prior(config.prior, shape, network)
    prior.moves = True  # a flow that has learned
    random = RoundRandom(config, 0, shape, device, prior, lambda codes: network.decode(codes).detach())
    images, rows = torch.empty(256, *shape, device=device), torch.arange(64, device=device)
    objective = config.objective
    with Watch() as watch:
        batch = Batch(
            images=images[rows],
            latents=random.latents(rows + 4096) if objective.needs_latents else None,
            damaged=random.damaged(images[rows], rows) if objective.needs_damaged else None,
            distance=choose_distance(objective, None),
            frozen=network,
            normals=lambda step: random.normals(rows, step),
        )
        with torch.autocast(pretend.NAME, dtype=torch.bfloat16):
            total = compute_losses(objective, network, batch)["total"]
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
    return watch


def settings(name: str, *options: str) -> Config:
    """A recipe with options."""
    return parse(["--config", str(ROOT / f"configs/{name}.yaml"), *options])


def cases() -> Any:
    """Name, settings and shape of an image."""
    for name, shape in (("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32)), ("folder64", (3, 64, 64))):
        yield name, settings(name), shape
    options = ["--objective.imle=0.3", "--prior.width=16"]  # latents that a flow draws, of either kind of code
    yield "spatial flow", settings("cifar10", *options), (3, 32, 32)
    yield "dense flow", settings("mnist", *options, "--prior.name=flow"), (1, 28, 28)
    for prior in ("gaussian", "smooth", "halves", "fourier"):
        yield prior, settings("mnist_imle", f"--prior.name={prior}"), (1, 28, 28)
    options = ["--objective.imle=1", "--objective.third=idempotence", "--prior.name=gaussian"]
    yield "idempotence", settings("mnist", *options), (1, 28, 28)


def main() -> None:
    device = pretend.device()
    for name, config, shape in cases():
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                watch = step(config, shape, device)
                said = watch.problems or ["sound"]
            except Exception as error:  # as a fake tensor's value is asked for
                watch, said = Watch(), [f"{type(error).__name__}: {error}".splitlines()[0]]
        print(f"{name}: {sum(watch.launches.values())} launches: {'; '.join(said)}")
        if "-v" in sys.argv:
            print(watch.launches.most_common(30))


if __name__ == "__main__":
    main()
