"""The prior that is learned by gradient descent: a flow from noise to the codes of the data, and its student."""

from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from naign.model.prior import flow as flows
from naign.model.prior.flow import RIDGE, Flow, FlowConfig, cosine
from naign.model.prior.learner import WARMUP
from tests.match.problems import draw
from tests.model.made import assert_near
from tests.model.prior.ranks import fit_on_ranks, in_memory

SETTINGS = FlowConfig(
    width=64,
    depth=2,
    passes=8,
    batch=128,
    steps=6,
)
GUIDED_SETTINGS = replace(SETTINGS, passes=2, guidance=1.0)
TAUGHT_SETTINGS = replace(GUIDED_SETTINGS, student=300)


@pytest.fixture(autouse=True)
def few_paths(monkeypatch):
    monkeypatch.setattr(flows, "TAUGHT", 256)


def make_codes(seed=0, count=1024):
    """Two clusters, of one and three quarters of the codes, in which the second value is twice the first."""
    first, second = 0.1 * draw(seed, 2, count)
    first += 3 * (torch.arange(count) % 4 > 0)
    return torch.stack([first, second + 2 * first], dim=1)


def build(config=SETTINGS, shape=(2,)):
    return Flow(config, shape, seed=3).requires_grad_(False)


def fitted(config=SETTINGS, codes=None):
    if codes is None:
        codes = make_codes()
    prior = build(config, tuple(codes.shape[1:]))
    shares = list(prior.fit(in_memory(codes)))
    assert shares == sorted(shares)
    assert shares[-1] == 1
    return prior


def test_each_code_is_learned_from_as_often_as_asked_in_chunks():
    prior = build()
    (_, first), (_, second) = prior._batches((300, 212), 0)
    for batches, size in ((first, 300), (second, 212)):
        times = torch.cat(batches).bincount()
        assert times.tolist() == [SETTINGS.passes] * size
    (_, left), _ = prior._batches((300, 212), 5)
    assert torch.equal(torch.cat(left), torch.cat(first[5:]))


def test_the_learning_rate_falls_to_zero_after_its_warm_up():
    prior = build()
    rates = []
    for _ in prior.fit(in_memory(make_codes())):
        made = len(rates) + 1
        rates.append(prior.learner.optimizer.param_groups[0]["lr"] / min(1.0, made / WARMUP))
    whole = [SETTINGS.lr * cosine(step / len(rates)) for step in range(len(rates))]
    assert rates == pytest.approx(whole)
    assert cosine(0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 4, 9, 16, 19, 23])
def test_a_fit_goes_on_bit_for_bit(steps):
    """Before and after guidance keeps its weights, and when it does; at the end of the flow, and as its student
    learns from either chunk of paths.
    """
    codes = in_memory(make_codes())
    whole = build(TAUGHT_SETTINGS)
    total = len(list(whole.fit(codes)))
    assert total == 16 + 2 * 4
    stopped = build(TAUGHT_SETTINGS)
    list(islice(stopped.fit(codes), steps))
    resumed = build(TAUGHT_SETTINGS)
    resumed.load_training_state(deepcopy(stopped.training_state()))
    assert len(list(resumed.fit(codes))) == total - steps
    found = resumed.training_state()
    for name, value in whole.training_state().items():
        assert torch.equal(value, found[name]), name


def test_guidance_moves_away_from_what_the_flow_was_after_a_quarter_of_its_training():
    config = replace(SETTINGS, steps=1, guidance=1.5)
    prior = build(config)
    fit = prior.fit(in_memory(make_codes()))
    list(islice(fit, 16))  # of 64 steps
    quarter = deepcopy(prior.velocity)
    list(fit)
    for value, expected in zip(prior.early.parameters(), quarter.parameters(), strict=True):
        assert torch.equal(value, expected)
    noise = torch.randn(5, 2)
    again = build(config)
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again.solve(noise), prior.solve(noise))


def test_a_student_reaches_in_two_evaluations_what_the_flow_does_in_many():
    config = replace(SETTINGS, passes=40, guidance=0.5, student=1024)
    prior = fitted(config)
    noise = torch.randn(2000, 2)
    followed = prior._path(noise, None)[-1] @ prior.outward.T + prior.mean
    assert (prior.solve(noise) - followed).abs().mean() < 0.2 * followed.std()
    assert list(prior.read_metrics()) == ["prior/student"]


@pytest.mark.parametrize(
    "shape",
    [
        (3,),
        (3, 5, 5),
        (1, 16, 16),
    ],
)
def test_a_flow_fits_any_code(shape):
    flow = Flow(FlowConfig(width=8, depth=2, steps=3), shape)
    noise = torch.randn(4, *shape)
    velocity = flow.velocity(noise, torch.rand(4), None)
    assert velocity.shape == noise.shape == flow.whiten(noise).shape
    assert_close(flow.solve(noise), noise)
    torch.nn.init.ones_(flow.velocity.outer.bias)  # a velocity of 1 everywhere
    assert_close(flow.solve(noise), noise + 1)


def test_whitened_codes_have_no_spread_of_their_own():
    turn = torch.randn(4, 4)
    mixed = torch.einsum("ij,njhw->nihw", turn, torch.randn(500, 4, 6, 6)) + 5
    prior = build(shape=(4, 6, 6))
    next(prior.fit(in_memory(mixed)))
    white = prior.whiten(mixed).transpose(0, 1).flatten(1)
    variances = torch.linalg.eigvalsh(mixed.transpose(0, 1).flatten(1).cov())
    expected = variances / (variances + RIDGE * variances.mean())  # near 1, but for directions of little spread
    assert_near(torch.linalg.eigvalsh(white.cov()), expected, 1e-3)
    assert_near(white.mean(1), torch.zeros(4), 1e-3)


def test_of_many_directions_the_leading_ones_are_modelled(monkeypatch):
    monkeypatch.setattr(flows, "DIRECTIONS", 2)
    spread = torch.tensor([0.01, 3.0, 0.02, 2.0, 0.03])
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    mixed = torch.randn(2000, 5) * spread @ turn + 1
    prior = fitted(FlowConfig(width=16, depth=1, passes=1), mixed)
    assert prior.noise_shape == (2,)
    white = prior.whiten(mixed)
    back = white @ prior.outward.T + prior.mean
    assert 0 < (back - mixed).square().mean(0).sum() < 0.002
    assert prior.draw(0, 0, torch.arange(7), "cpu").shape == (7, 5)


def test_ranks_learn_what_one_would():
    ranks = [build(TAUGHT_SETTINGS) for _ in range(3)]
    fit_on_ranks(ranks, make_codes())
    alone = fitted(TAUGHT_SETTINGS).state_dict()
    for prior in ranks:
        for name, value in prior.state_dict().items():
            assert_close(value, alone[name], atol=1e-4, rtol=1e-4)
