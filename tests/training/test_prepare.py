"""What a run is built from, before anything is trained."""

from types import SimpleNamespace

import pytest
import torch

from naign.config import load, parse
from naign.model.networks import build_network
from naign.training.prepare import build_model, count_flops
from tests.conftest import SMALL

ALONE = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--objective.imle=0"], True),
        (["--objective.imle=0", "--objective.third=matched"], False),
        (["--objective.imle=0", "--prior.name=gmm", "--prior.components=3", "--train.images=2560"], False),
        ([], False),
    ],
)
def test_latents_that_f_is_not_trained_on_are_warned_of(options, warned, digits, caplog):
    stream, *_ = build_model(parse([f"--data.path={digits}", *SMALL, *options]), ALONE, None)
    stream.close()
    assert ("so f(z) is no sample" in caplog.text) == warned


def weights(options, start=None):
    stream, network, _ = build_model(parse(options), ALONE, start)
    stream.close()
    return network.state_dict()


@pytest.mark.parametrize(("before", "after"), [("blend", "no-blend"), ("no-blend", "blend")])
def test_a_network_with_blend_begins_from_one_without_and_the_reverse(before, after, digits, caplog):
    options = [f"--data.path={digits}", *SMALL, "--model.name=spatial"]
    other = weights([*options, "--seed=1", f"--model.{before}"])
    metadata = {"model": {"name": "spatial"}, "prior": {"name": "smooth"}}
    with caplog.at_level("INFO"):
        made = weights([*options, "--model.init=other", f"--model.{after}"], (metadata, other, {}))
    new = [name for name, value in made.items() if not any(torch.equal(value, one) for one in other.values())]
    assert f"36 of 38 weights are from other, not {', '.join(sorted(new))}" in caplog.text and len(new) == 2


def test_a_prior_that_is_not_taken_over_is_named(digits, caplog):
    options = [f"--data.path={digits}", *SMALL, "--prior.name=gmm", "--train.images=2560", "--prior.components=3"]
    start = {"model": {"name": "conv"}, "prior": {"name": "gmm"}}, weights(options), {"weights": torch.ones(2)}
    with caplog.at_level("INFO"):
        weights([*options, "--model.init=other"], start)
    assert "the prior is not from other: its name, its classes or its sizes differ" in caplog.text


@pytest.mark.parametrize(
    ("name", "threads", "warned"), [("folder64", 2, True), ("folder64", 64, False), ("mnist", 1, False)]
)
def test_a_recipe_for_gpus_is_warned_of_on_cpus(name, threads, warned, caplog, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config, shape = load(name), (1, 28, 28) if name == "mnist" else (3, 64, 64)
    with torch.device("meta"):
        network = build_network(config.model, shape)
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"), is_main_process=True)
    assert count_flops(config, network, shape, alone) > 1e6
    assert ("would take about 80 hours on 2 threads: use a GPU, or" in caplog.text) == warned
