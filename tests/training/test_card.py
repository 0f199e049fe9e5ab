"""What a fit step, a draw and learning ask of a GPU: how many launches, and nothing that waits for it."""

import re
import sys

import pytest
import torch
from accelerate import Accelerator

from naign.config import parse
from naign.model.networks import build_network
from naign.training.engines import build_engine
from naign.training.loop import fit
from tests.conftest import ROOT, environment
from tests.programs import execute, succeeded
from tests.training.card import STEPS, Watch, cases, round_of

MOST = {  # of STEPS steps, a draw, and two steps of learning
    **{"mnist": 4100, "cifar10": 5000, "folder64": 6000},
    **{"cifar10's flow draws": 2200, "cifar10's flow learns": 6000},
}


@pytest.mark.slow
def test_steps_draws_and_learning_mix_no_devices_and_wait_for_none():
    command = [sys.executable, "-m", "tests.training.card"]
    done = succeeded(execute(command, env=environment()))
    lines = [re.fullmatch(r"(.*): (\d+) launches: sound", line) for line in done.stdout.splitlines()]
    assert len(lines) == len(list(cases())) and all(lines), done.stdout
    launches = {line[1]: int(line[2]) for line in lines if line}
    for name, most in MOST.items():
        assert launches[name] <= most, (name, launches[name])


@pytest.mark.parametrize(("name", "shape", "most"), [("mnist", (1, 28, 28), 970), ("cifar10", (3, 32, 32), 1100)])
def test_launches_of_a_fit_step(name, shape, most):
    options = [
        "--latents.name=gaussian",
        "--objective.third=none",
        "--objective.imle=0.3",
        "--train.batch=2",
        "--train.precision=bf16",
    ]
    config = parse(["--config", str(ROOT / f"configs/{name}.yaml"), *options])
    network = build_network(config.model, shape)
    engine = build_engine(config, network, Accelerator(mixed_precision="bf16", cpu=True))
    engine.ahead = True
    engine.optimizer.defaults["fused"] = True
    for group in engine.optimizer.param_groups:
        group["fused"] = True
    device = torch.device("cpu")
    run, images, match = round_of(config, shape, device, engine)
    with Watch() as watch:
        fit(run, images, match)
    assert sum(watch.launches.values()) <= STEPS * most, watch.launches.most_common(20)
    assert not watch.problems
