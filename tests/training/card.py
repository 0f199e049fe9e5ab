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
from pipeline.model.mixture import fit_mixture
from pipeline.model.networks import build_network
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


def step(config: Config, shape: tuple[int, ...], state: dict[str, torch.Tensor], device: torch.device) -> Watch:
    """Random numbers, forward, backward and clipping of one micro-batch, as `fit` does them."""
    with device:
        network: Any = build_network(config.model, shape)
    code = getattr(network, "code", None)
    decode = None if code is None else lambda codes: network.decode(codes).detach()
    random = RoundRandom(
        config, 0, shape, device, {name: value.to(device) for name, value in state.items()}, decode, code
    )
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
    """Name, settings, shape of an image and state of the law."""
    for name, shape in (("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32)), ("folder64", (3, 64, 64))):
        yield name, settings(name, "--match.latents=gaussian"), shape, {}
    mixture = fit_mixture(torch.randn(200, 64), 3)
    yield "mnist, codes", settings("mnist"), (1, 28, 28), mixture
    for law in ("smooth4", "mixture", "fourier"):
        state = {"spectrum": torch.ones(2, 2, 1, 28, 28)} if law == "fourier" else {}
        config = parse(
            ["--config", str(ROOT / "configs/mnist_imle.yaml"), f"--match.latents={law}", "--match.flat=0.25"]
        )
        yield law, config, (1, 28, 28), state
    options = ["--objective.imle=1", "--objective.third=idempotence", "--match.latents=gaussian"]
    yield "idempotence", settings("mnist", *options), (1, 28, 28), {}


def main() -> None:
    device = pretend.device()
    for name, config, shape, state in cases():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            there = {key: mode.from_tensor(value) for key, value in state.items()}
            try:
                watch = step(config, shape, there, device)
                said = watch.problems or ["sound"]
            except Exception as error:  # as a fake tensor's value is asked for
                watch, said = Watch(), [f"{type(error).__name__}: {error}".splitlines()[0]]
        print(f"{name}: {sum(watch.launches.values())} launches: {'; '.join(said)}")
        if "-v" in sys.argv:
            print(watch.launches.most_common(30))


if __name__ == "__main__":
    main()
