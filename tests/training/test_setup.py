"""What a run is built from, before anything is trained."""

from types import SimpleNamespace

import pytest
import torch

from naign.config import load, parse
from naign.model.networks import build_network
from naign.observe import forward_flops
from naign.training.setup import build_model, count_codes, open_stream, warm_start, warn_before

ALONE = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--objective.imle=0"], True),
        (["--objective.imle=0", "--objective.third=matched"], False),
        (["--objective.imle=0", "--prior.name=gmm", "--prior.components=3"], False),
        ([], False),
    ],
)
def test_a_run_without_samples_is_warned_of(options, warned, small, caplog):
    config = parse([*small, *options])
    with open_stream(config, ALONE) as stream:
        network, _, prior = build_model(config, stream, ALONE.device)
        warn_before(config, network, prior, 1, ALONE)
    assert ("so it has no samples" in caplog.text) == warned


@pytest.mark.parametrize(("before", "after"), [("blend", "no-blend"), ("no-blend", "blend")])
def test_a_network_with_blend_begins_from_one_without_and_the_reverse(before, after, small, caplog):
    options = [*small, "--model.name=spatial"]
    other = build_network(parse([*options, "--seed=1", f"--model.{before}"]).model, (1, 8, 8)).state_dict()
    config = parse([*options, "--model.init=other", f"--model.{after}"])
    network = build_network(config.model, (1, 8, 8))
    with caplog.at_level("INFO"):
        warm_start(config, ("spatial", other), network)
    new = []
    for name, value in network.state_dict().items():
        if not any(torch.equal(value, one) for one in other.values()):
            new.append(name)
    assert f"36 of 38 weights are from other, not {', '.join(sorted(new))}" in caplog.text and len(new) == 2


@pytest.mark.parametrize(
    ("name", "threads", "warned"),
    [
        ("folder64", 2, True),
        ("folder64", 64, False),
        ("mnist", 1, False),
    ],
)
def test_a_recipe_for_gpus_is_warned_of_on_cpus(name, threads, warned, caplog, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config = load(name)
    shape = (1, 28, 28) if name == "mnist" else (3, 64, 64)
    with torch.device("meta"):
        network = build_network(config.model, shape)
    prior = SimpleNamespace(decodes=True)
    warn_before(config, network, prior, forward_flops(network, shape), ALONE)
    assert ("hours on 2 threads: use a GPU, or" in caplog.text) == warned


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ([], 1438),
        (["--data.flip"], 5000),
        (["--prior.images=99"], 99),
    ],
)
def test_no_image_is_encoded_twice_unless_its_code_differs(options, codes, small):
    config = parse([*small, "--prior.name=gmm", "--prior.images=5000", *options])
    with open_stream(config, ALONE) as stream:
        assert count_codes(config, stream) == codes
