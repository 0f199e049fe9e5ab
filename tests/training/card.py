"""Fit steps on tensors that only claim to be on a device: what mixes devices, waits for the device, or uploads.

    python -m tests.training.card

prints a line for each case. A process of its own: it registers a device with torch.
"""

import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import Config, parse
from pipeline.distributed.engine import Engine
from pipeline.match import Match
from pipeline.model.networks import build_network
from pipeline.model.prior import build_prior
from pipeline.training import fit as fitting
from pipeline.training.fit import fit
from pipeline.training.round import RoundRandom, RoundState
from pipeline.training.state import Position
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


class Card(Engine):
    """The engine of a GPU, with its autocast; its AdamW is left out, which is torch's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pretend.NAME, dtype=torch.bfloat16):
            return super().forward(x)

    def step(self) -> float:
        self._adam.step = lambda: None
        super().step()
        return 1.0  # `settle` reads the norm of the step before, which the device has by then


def round_of(config: Config, shape: tuple[int, ...], device: torch.device, engine: Engine, prior: Any) -> Any:
    """A run and the state of its first round, of two steps, as `fit` takes them."""
    images = 2 * config.train.batch
    config.match.round = images
    random = RoundRandom(config, 0, shape, device, prior, partial(engine.exported, "decode"))
    state = RoundState(
        number=0, world_size_at_start=1, random=random, images=torch.empty(images, *shape, device=device)
    )
    if config.objective.needs_match:
        state.match = Match(ids=torch.arange(images) + 4096, distances=torch.zeros(images), values={})
    run: Any = SimpleNamespace(
        **{"config": config, "accelerator": engine.accelerator, "rank": 0, "world": 1, "network_rounds": 9},
        **{"engine": engine, "position": Position(), "features": None, "perceived": None},
        stop=SimpleNamespace(poll_stop=lambda elapsed: (False, elapsed)),
        watchdog=SimpleNamespace(beat=lambda: None),
        monitor=SimpleNamespace(advance=lambda images: None),
    )
    return run, state


def steps(config: Config, shape: tuple[int, ...], device: torch.device) -> Watch:
    """The steps of a round by `fit`, with the recipe's prior."""
    AcceleratorState._reset_state(True)
    with device:
        network: Any = build_network(config.model, shape)
        prior: Any = build_prior(config.prior, shape, network, seed=0)
    prior.moves = True  # a flow that has learned
    adam: Any = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01, "clip": 1.0}
    accelerator = Accelerator(cpu=True, device_placement=False)
    engine = Card(accelerator, network, **adam, batch=config.train.batch, ema=0.9, ahead=True)
    run, state = round_of(config, shape, device, engine, prior)
    with Watch() as watch:
        fit(run, state)
    assert run.position.step == 2
    uploads = [f"a copy of (2, {config.train.batch}) to {device.type}"]
    if state.match:
        uploads.append(f"a copy of ({len(state.images)},) to {device.type}")
    for once in uploads:  # a round
        watch.problems.remove(once)
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
    yield "ign", settings("mnist_ign"), (1, 28, 28)


def main() -> None:
    device = pretend.device()
    fitting.means = lambda run, state: {}  # read once a round
    for name, config, shape in cases():
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                watch = steps(config, shape, device)
                said = watch.problems or ["sound"]
            except Exception as error:  # as a fake tensor's value is asked for
                watch, said = Watch(), [f"{type(error).__name__}: {error}".splitlines()[0]]
        print(f"{name}: {sum(watch.launches.values())} launches: {'; '.join(said)}")
        if "-v" in sys.argv:
            print(watch.launches.most_common(30))


if __name__ == "__main__":
    main()
