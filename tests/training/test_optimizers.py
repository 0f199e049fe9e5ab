"""The optimizers by name: what they step, and that a restored one goes on bit for bit."""

from importlib.metadata import EntryPoint
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from naign.config import TrainConfig
from naign.distributed.engine import Engine
from naign.distributed.optimizers import OPTIMIZERS, Muon, find_optimizer
from naign.errors import InputError
from tests.distributed.fsdp_cases import hand_over
from tests.e2e.runs import same


def momentum(parameters, *, lr, **_):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def narrow(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


def nothing(parameters, **_):
    return None


def failing(parameters, **_):
    raise ValueError("no such learning rate")


bare = map  # a builtin without a signature


class Counting(torch.optim.Optimizer):
    def __init__(self, parameters, *, lr, **_):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for value in self.param_groups[0]["params"]:
            self.state[value] = {"calls": 1 + self.state[value].get("calls", 0)}


@pytest.fixture(autouse=True)
def theirs(monkeypatch):
    points = {}
    for name in ("momentum", "Counting", "narrow", "nothing", "failing", "bare"):
        points[name] = EntryPoint(name, f"{__name__}:{name}", "naign.optimizers")
    asked = {"naign.optimizers": points}
    monkeypatch.setattr("naign.settings.registry._entry_points", lambda group: asked.get(group, {}))


def make(optimizer, *, ahead=None, **settings):
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1),
        nn.Flatten(),
        nn.Linear(128, 9),
        nn.Linear(9, 128),
        nn.Unflatten(1, (8, 4, 4)),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
    )
    train = TrainConfig(optimizer=optimizer, lr=1e-2, batch=4, **settings)
    return Engine(Accelerator(cpu=True), network, train, ahead=ahead)


def train(engine, first, last):
    losses = []
    for number in range(first, last):
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(number % 2))
        with engine.micro_batch():
            loss = (engine.forward(images) - images).square().mean()
            engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", [*OPTIMIZERS, "momentum"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name):
    whole = make(name)
    first = make(name)
    second = make(name)
    losses = train(whole, 0, 12)
    assert losses[-1] < losses[1]
    train(first, 0, 5)
    hand_over(first, second)
    assert train(second, 5, 12) == losses[5:]
    for (_, mine), (_, other) in zip(whole.states(), second.states(), strict=True):
        assert len(mine) > 1 and same(mine, other)


def test_muon_takes_a_kernel_as_the_matrix_of_its_patches_and_adamw_a_vector():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 3, 4, 4))
    bias = nn.Parameter(torch.randn(6))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    vector = nn.Parameter(bias.detach().clone())
    ours = Muon([kernel, bias], lr=0.1, weight_decay=0.02)
    muon = torch.optim.Muon([matrix], lr=0.05, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([vector], lr=0.05, betas=(0.9, 0.99), weight_decay=0.02)
    ours.param_groups[0]["lr"] = 0.05
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        bias.grad = torch.randn_like(bias)
        matrix.grad = kernel.grad.flatten(1).clone()
        vector.grad = bias.grad.clone()
        ours.step()
        muon.step()
        adamw.step()
    assert torch.equal(kernel.flatten(1), matrix) and torch.equal(bias, vector)


def test_only_fused_adamw_leaves_its_norm_on_the_device():
    for name in OPTIMIZERS:
        assert make(name, ahead=True).ahead == (name == "adamw")


def test_an_unknown_optimizer_names_the_known_ones():
    with pytest.raises(InputError, match="train.optimizer is 'moun': .*adamw, muon, adafactor.*; did you mean muon"):
        find_optimizer("moun")


def test_an_optimizer_is_tried_once(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "counted", Mock(side_effect=OPTIMIZERS["adamw"]))
    assert find_optimizer("counted") is find_optimizer("counted") is OPTIMIZERS["counted"]
    assert OPTIMIZERS["counted"].call_count == 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("narrow", "unexpected keyword"),
        ("nothing", "it returns a NoneType"),
        ("failing", "no such"),
        ("bare", "map"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(name, problem):
    with pytest.raises(InputError, match=f"'{name}' cannot be built: .*{problem}.*: fix its package"):
        find_optimizer(name)


def test_a_state_that_no_checkpoint_holds_is_refused():
    engine = make("Counting")
    engine.step()
    with pytest.raises(InputError, match="keeps 'calls' of a weight"):
        list(engine.states())
    next(iter(engine._adam.state.values()))["calls"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(InputError, match="not a tensor of floats"):
        list(engine.states())
