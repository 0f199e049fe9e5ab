"""Priors of codes that are conditioned on classes, so that samples of one can be asked for."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network
from naign.model.prior import CodesPrior, Flow, FlowConfig, MixtureConfig, build_prior, flow
from naign.model.prior.base import CodesConfig
from tests.match.problems import draw
from tests.model.made import CONV, assert_near, make_model, prior_state
from tests.model.prior.ranks import in_memory
from tests.refused import refused

LABELS = ("cat", "dog", "3")
SHARES = torch.tensor([0.25, 0.5, 0.25])
NETWORK = build_network(ConvConfig(width=4, code=4), (1, 8, 8)).requires_grad_(False)
FLOW = FlowConfig(
    classes=True,
    width=64,
    depth=2,
    passes=24,
    batch=128,
    steps=8,
)
GMM = MixtureConfig(classes=True, components=8)


def make_codes(count=4096):
    """Codes (n, 4) and labels: each class has a mean of its own, and all the same spread."""
    labels = torch.tensor([0, 1, 2, 1]).repeat(count // 4)
    means = torch.tensor([[-3.0, 0, 0, 0], [3, 0, 0, 0], [0, 3, 0, 0]])
    return means[labels] + 0.5 * draw(0, count, 4), labels


def class_of(codes):
    return torch.where(codes[:, 1] > 1.5, 2, (codes[:, 0] > 0).long())


def build(config):
    prior = build_prior(
        config,
        (1, 8, 8),
        NETWORK,
        seed=3,
        labels=LABELS,
    )
    assert isinstance(prior, CodesPrior)
    return prior


def fitted(config):
    prior = build(config)
    list(prior.fit(in_memory(*make_codes())))
    return prior


@pytest.fixture(
    scope="module",
    params=[FLOW, replace(FLOW, guidance=0.5), GMM],
    ids=["flow", "guided flow", "gmm"],
)
def prior(request):
    """Each of them, fitted."""
    return fitted(request.param)


def test_draws_are_of_the_class_that_is_asked_for(prior):
    ids = torch.arange(600)
    for number in range(len(LABELS)):
        drawn = prior.draw(
            0,
            0,
            ids,
            "cpu",
            torch.full((600,), number),
        )
        assert (class_of(drawn) == number).float().mean() > 0.97, LABELS[number]
        assert drawn.std(0).mean() > 0.3


def test_without_a_label_classes_are_as_frequent_as_in_the_data(prior):
    ids = torch.arange(4000)
    chosen = prior.choose(5, 1, ids, "cpu")
    assert_near(chosen.bincount() / 4000, SHARES, 0.03)
    assert_close(prior.class_counts / prior.class_counts.sum(), SHARES)
    drawn = prior.draw(5, 1, ids, "cpu")
    assert_close(
        drawn,
        prior.draw(
            5,
            1,
            ids,
            "cpu",
            chosen,
        ),
    )
    assert (class_of(drawn) == chosen).float().mean() > 0.97
    some = [70, 3]
    again = prior.draw(5, 1, ids[some], "cpu")
    assert_close(again, drawn[some], atol=1e-5, rtol=1e-4)


def test_every_component_of_a_mixture_is_of_one_class():
    prior = fitted(GMM)
    assert prior.owners.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]  # one each, the others in proportion
    mass = torch.zeros(3).index_add(0, prior.owners, prior.weights)
    assert_near(mass, SHARES, 0.01)


def test_guidance_leads_away_from_an_early_flow_which_sees_no_class_late_on_the_path(monkeypatch):
    monkeypatch.setattr(flow, "BLIND", 0.5)
    config = replace(FLOW, steps=2, guidance=1.5)
    prior = fitted(replace(config, passes=6))
    for value in prior.early.parameters():
        nn.init.normal_(value, std=0.2)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    monkeypatch.setattr(prior, "outward", torch.eye(4))  # so that what is drawn are whitened codes
    monkeypatch.setattr(prior, "mean", torch.zeros(4))
    start = torch.randn(6, 4)
    end = prior.solve(start, labels)
    at_start = (start, torch.zeros(6), labels)
    before = 2.5 * prior.velocity(*at_start) - 1.5 * prior.early(*at_start)
    middle = start + before / 2
    half = torch.full((6,), 0.5)
    blind = prior.early(middle, half, torch.full((6,), 3))
    after = 2.5 * prior.velocity(middle, half, labels) - 1.5 * blind
    assert_close(end, middle + (1.5 * after - 0.5 * before) / 2)
    assert (prior.early(middle, half, labels) - blind).abs().mean() > 0.02


def test_a_flow_learns_without_a_label_too():
    prior = fitted(FLOW)
    blind = prior.solve(torch.randn(2000, 4), torch.full((2000,), 3))
    assert_near(class_of(blind).bincount() / 2000, SHARES, 0.1)


def test_spatial_codes_have_classes_too():
    config = FlowConfig(
        classes=True,
        width=8,
        depth=1,
        steps=2,
    )
    prior = Flow(config, (2, 5, 5), labels=LABELS)
    for value in prior.velocity.parameters():
        nn.init.normal_(value, std=0.2)
    noise = torch.randn(3, 2, 5, 5)
    first = prior.solve(noise, torch.zeros(3, dtype=torch.int64))
    other = prior.solve(noise, torch.ones(3, dtype=torch.int64))
    assert first.shape == noise.shape
    assert not torch.allclose(first, other)


def test_what_does_not_fit_is_refused():
    with refused("classes does not go with prior.name=none: choose flow or gmm"):
        build(CodesConfig(name="none", classes=True))
    with refused("the data set has no labels"):
        build_prior(FLOW, (1, 8, 8), NETWORK)
    with refused("prior.components=2 for 3 classes"):
        build(replace(GMM, components=2))


def model(config):
    return make_model(
        CONV | {"code": 4},
        state=prior_state(fitted(config)),
        prior=asdict(config),
        labels=list(LABELS),
    )


def test_other_steps_leave_the_student_out(monkeypatch):
    monkeypatch.setattr(flow, "TAUGHT", 256)
    taught = model(replace(FLOW, passes=3, student=256))
    other = taught.with_flow(steps=FLOW.steps)
    assert not torch.equal(other.sample(6), taught.sample(6))
    assert_close(other.sample(6), model(replace(FLOW, passes=3)).sample(6))


def test_samples_of_a_class_of_a_model(tmp_path):
    model(replace(FLOW, passes=3, guidance=0.5)).save_pretrained(tmp_path)
    read = NAIGN.from_pretrained(tmp_path)
    for label, number in (
        ("dog", 1),
        ("1", 1),
        ("3", 2),
        (2, 2),
    ):
        assert read.find_label(label) == number
    dogs = read.sample(6, seed=2, label="dog")
    assert torch.equal(dogs, read.sample(6, seed=2, label=1))
    assert not torch.equal(dogs, read.sample(6, seed=2, label=2))
    whole = read.latent(torch.arange(6), seed=2, label=1)
    assert_close(read.latent(torch.tensor([4]), seed=2, label=1), whole[4:5])
    other = read.with_flow(guidance=2.0)
    assert not torch.equal(other.sample(6, label=1), read.sample(6, label=1))
    assert other.prior.config.guidance == 2
    with refused("prior.steps is 2.5: it must be a whole number"):
        read.with_flow(steps=2.5)
    chosen = read.choose(torch.arange(6), seed=2).tolist()
    one = read.sample(6, seed=2)[3:4]
    assert_close(read.sample(6, seed=2, label=chosen[3])[3:4], one)


def test_labels_and_guidance_that_a_model_does_not_know():
    known = model(replace(FLOW, passes=2))
    for wrong in (3, -1, "7"):
        with refused(r"among its 3 classes: give a name \(cat, dog, 3\) or a number"):
            known.sample(2, label=wrong)
    known.prior.class_counts[0] = 0
    with refused("'cat' was not among the images of the training"):
        known.sample(2, label="cat")
    with refused("the flow was trained without guidance"):
        known.with_flow(guidance=1)
    known = model(replace(FLOW, passes=2, guidance=1.0))
    with refused("guidance is 11"):
        known.with_flow(guidance=11)
    plain = make_model()
    with refused("label 0 can be asked of a prior with classes"):
        plain.sample(2, label=0)
    with refused("this prior is 'none'"):
        plain.with_flow(guidance=1)
