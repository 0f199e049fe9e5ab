"""Rounds on tensors that only claim to be on a device: what mixes devices, waits for the device, or uploads.

    python -m tests.training.card

prints a line for each case: `fit` and its engine, with the recipe's prior, and a prior's draws and learning. Of the
program only Accelerate's placement is replaced. A process of its own: it registers a device with torch.
"""

import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from naign import philox
from naign.config import parse
from naign.distributed.engine import Engine
from naign.match import Match
from naign.model.networks import build_network
from naign.model.prior import build_latents, build_prior
from naign.training.loop import fit
from naign.training.state import State
from tests import pretend
from tests.conftest import ROOT
from tests.model.prior.ranks import in_memory

NO_LAUNCH = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "alias", "device")
STEPS = 3  # a pass: the norm of the first may be read once the third is on its way
RECIPES = {
    "toy2d": (2,),
    "mnist": (1, 28, 28),
    "mnist_ign": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "folder64": (3, 64, 64),
}
philox._CHUNK[pretend.NAME] = philox._CHUNK["cuda"]
HOST_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


def tensors_in(tree):
    return [value for value in tree_leaves(tree) if isinstance(value, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Counts operations, and notes what a real device would wait for.

    A value that was computed before the newest of two steps may be read: the device has it by then.
    """

    def __init__(self, free_after=sys.maxsize):
        """After so many steps of AdamW, the last of a round, everything may be read."""
        super().__init__()
        self.launches = Counter()
        self.problems = []
        self.free_after = free_after
        self.uploads = Counter()  # by shape
        self._steps = 0  # of AdamW
        self._born = WeakIdKeyDictionary()  # steps before each tensor was made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        tensors = tensors_in((args, kwargs or {}))
        if len({value.device for value in tensors if value.ndim}) > 1:
            self.problems.append(f"{name} of tensors on several devices")
        waits = name in HOST_READS and any(value.device.type != "cpu" for value in tensors)
        if waits and self._steps < self.free_after and self._steps - self._born.get(tensors[0], 0) < 2:
            self.problems.append(f"{name} waits for the device")
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:  # a fake tensor has no value
            return 1.0
        if not func.is_view and name not in NO_LAUNCH:
            self.launches[name] += 1
        self._steps += name == "_fused_adamw_"
        made = tensors_in(result)
        for value in made:
            self._born[value] = self._steps
        if name == "_to_copy" and tensors[0].device != made[0].device and self._steps < self.free_after:
            self.uploads[tuple(tensors[0].shape)] += 1
            if made[0].device.type == "cpu":
                self.problems.append(f"a copy of {tuple(tensors[0].shape)} to the host")
        return result


class Card(Engine):
    """The engine of a GPU, with its autocast."""

    def forward(self, x):
        with torch.autocast(pretend.NAME, dtype=torch.bfloat16):
            return super().forward(x)


def round_of(config, shape, device, engine):
    """A run, and the images and the match of its first round, of STEPS steps a pass, as `fit` takes them."""
    count = STEPS * config.train.batch
    config.match.round = count
    latents = build_latents(config.latents, shape).to(device)
    images = torch.empty(count, *shape, device=device)
    match = None
    if config.objective.needs_match:
        match = Match(ids=torch.arange(count) + 4096, distances=torch.zeros(count), values={})
    run = SimpleNamespace(
        config=config,
        accelerator=engine.accelerator,
        rank=0,
        world=1,
        rounds=9,
        engine=engine,
        apart=lambda phase, times: nullcontext(),
        latents=latents,
        state=State(),
        stop=SimpleNamespace(poll_stop=lambda elapsed: (False, elapsed)),
        watchdog=SimpleNamespace(beat=lambda: None),
        monitor=SimpleNamespace(advance=lambda images: None),
    )
    return run, images, match


def build(config, shape, device):
    """The recipe's network and its prior, as if it were fitted."""
    with device:
        network = build_network(config.model, shape)
        prior = build_prior(
            config.prior,
            shape,
            network,
            seed=0,
            labels=("a", "b", "c"),
        )
    return network, prior


def steps(config, shape, device):
    """The steps of a round by `fit`."""
    AcceleratorState._reset_state(True)
    network, _ = build(config, shape, device)
    accelerator = Accelerator(cpu=True, device_placement=False)
    settings = replace(config.train, accumulate=1, ema=0.9, compile=False)
    engine = Card(accelerator, network, settings, ahead=True)
    run, images, match = round_of(config, shape, device, engine)
    count = STEPS * config.train.passes
    with Watch(count) as watch:
        fit(run, images, match)
    assert run.state.step == count == watch.launches["_fused_adamw_"]
    once = Counter([(count, config.train.batch)])  # a round
    if match:
        once[(len(images),)] += 1
    if watch.uploads != once:
        watch.problems.append(f"uploads {dict(watch.uploads)}, not {once}")
    return watch


def draws(config, shape, device):
    """A draw of the prior, of ids on the device."""
    _, prior = build(config, shape, device)
    with Watch() as watch:
        prior.draw(0, 0, torch.arange(64, device=device), device)
    if watch.uploads:
        watch.problems.append(f"uploads {dict(watch.uploads)}")
    return watch


def learns(config, shape, device):
    """Two steps of the flow's fit; what lies before the first is once a chunk."""
    _, prior = build(config, shape, device)
    codes = torch.empty(4 * config.prior.batch, *prior.shape, device=device)
    fit_of = prior.fit(in_memory(codes))
    with Watch():
        next(fit_of)
    with Watch() as watch:
        for _ in range(2):
            next(fit_of)
    if set(watch.uploads) - {(config.prior.batch,)}:
        watch.problems.append(f"uploads {dict(watch.uploads)}")
    return watch


def settings(name, *options):
    """A recipe with options."""
    return parse(["--config", str(ROOT / f"configs/{name}.yaml"), *options])


def cases():
    """Name, what is watched, settings and shape of an image."""
    for name, shape in RECIPES.items():
        yield name, steps, settings(name), shape
    for name, shape, options in (("cifar10", (3, 32, 32), []), ("mnist", (1, 28, 28), ["--prior.name=flow"])):
        narrow = [*options, "--prior.width=16"]
        guided = [*narrow, "--prior.features=0", "--prior.classes", "--prior.guidance=1"]
        yield f"{name}'s flow draws", draws, settings(name, *options), shape
        yield f"{name}'s guided flow draws", draws, settings(name, *guided), shape
        student = settings(name, *narrow, "--prior.student=64", "--prior.features=0.7")
        yield f"{name}'s student draws", draws, student, shape
        yield f"{name}'s flow learns", learns, settings(name, *narrow), shape
    yield "mixture draws", draws, settings("mnist", "--prior.classes"), (1, 28, 28)


def main():
    device = pretend.device()
    for name, watched, config, shape in cases():
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                watch = watched(config, shape, device)
                lines = watch.problems or ["sound"]
            except Exception as error:  # as a fake tensor's value is asked for
                watch = Watch()
                lines = [f"{type(error).__name__}: {error}".splitlines()[0]]
        print(f"{name}: {sum(watch.launches.values())} launches: {'; '.join(lines)}")


if __name__ == "__main__":
    main()
