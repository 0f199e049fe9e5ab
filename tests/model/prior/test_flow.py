"""The prior that is learned by gradient descent: a flow from noise to the codes of the data, and its student."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import pytest
import torch

from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network
from naign.model.prior import Codes
from naign.model.prior import flow as flows
from naign.model.prior.flow import KEPT, RIDGE, TAUGHT, Flow, FlowConfig
from naign.model.prior.learner import WARMUP

SETTINGS = FlowConfig(width=64, depth=2, passes=8, batch=128, steps=6)
TAUGHT_SETTINGS = replace(SETTINGS, passes=2, autoguidance=1.0, student=300)


def make_codes(seed: int = 0, count: int = 1024) -> torch.Tensor:
    """Two clusters, of one and three quarters of the codes, in which the second value is twice the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, generator=generator) * 0.1 + 3 * (torch.arange(count) % 4 > 0)
    second = 2 * first + 0.1 * torch.randn(count, generator=generator)
    return torch.stack([first, second], dim=1)


def build(config: FlowConfig = SETTINGS, shape: tuple[int, ...] = (2,)) -> Flow:
    return Flow(config, shape, seed=3).requires_grad_(False)


def fitted(config: FlowConfig = SETTINGS, codes: torch.Tensor | None = None) -> Flow:
    codes = make_codes() if codes is None else codes
    prior = build(config, tuple(codes.shape[1:]))
    shares = list(prior.fit(Codes.of(codes)))
    assert shares == sorted(shares) and shares[-1] == 1
    return prior


@pytest.mark.slow
def test_the_flow_learns_clusters_and_their_shares():
    prior = fitted(replace(SETTINGS, passes=100))
    drawn = prior.draw(0, 0, torch.arange(4000), "cpu")
    share = float((drawn[:, 0] > 1.5).float().mean())
    assert 0.68 < share < 0.82
    between = ((drawn[:, 0] > 0.7) & (drawn[:, 0] < 2.3)).float().mean()
    assert between < 0.05
    assert float((drawn[:, 1] - 2 * drawn[:, 0]).std()) < 0.5


@pytest.mark.slow
def test_a_student_reaches_in_two_evaluations_what_the_flow_does_in_many():
    prior = fitted(replace(SETTINGS, passes=60, student=1024))
    noise = torch.randn(2000, 2)
    reached = prior.solve(noise)
    prior._enter(KEPT)
    followed = prior.solve(noise)
    assert float((reached - followed).abs().mean()) < 0.2 * float(followed.std())


def test_each_code_is_learned_from_as_often_as_asked_in_chunks():
    prior = build()
    chunks = {chunk: torch.cat(batches) for chunk, batches in prior._batches((300, 212), 0)}
    for chunk, size in ((0, 300), (1, 212)):
        assert torch.equal(chunks[chunk].bincount(minlength=size), torch.full((size,), SETTINGS.passes))
    (first, left), _ = prior._batches((300, 212), 5)
    assert first == 0
    assert torch.equal(torch.cat(left), chunks[0][5 * SETTINGS.batch :])


def test_the_learning_rate_falls_to_zero_after_its_warm_up():
    prior = build()
    rates = []
    for _ in prior.fit(Codes.of(make_codes())):
        made = len(rates) + 1
        rates.append(prior.learner.adam.param_groups[0]["lr"] / min(1.0, made / WARMUP))
    whole = [SETTINGS.lr * (1 + math.cos(math.pi * step / len(rates))) / 2 for step in range(len(rates))]
    assert rates == pytest.approx(whole)


@pytest.mark.parametrize("steps", [1, 5, 17, 20])
def test_a_fit_goes_on_bit_for_bit(steps):
    """From within the flow's training, before and after autoguidance keeps its weights, and within the student's."""
    codes = Codes.of(make_codes())
    whole = build(TAUGHT_SETTINGS)
    total = len(list(whole.fit(codes)))
    assert total == 16 + 5
    stopped = build(TAUGHT_SETTINGS)
    list(islice(stopped.fit(codes), steps))
    resumed = build(TAUGHT_SETTINGS)
    resumed.load_training_state({name: value.clone() for name, value in stopped.training_state().items()})
    assert len(list(resumed.fit(codes))) == total - steps
    for name, value in whole.training_state().items():
        assert torch.equal(value, resumed.training_state()[name]), name


def test_autoguidance_moves_away_from_what_the_flow_was_after_a_quarter_of_its_training():
    config = replace(SETTINGS, steps=1, autoguidance=1.5)
    prior = build(config)
    fit = prior.fit(Codes.of(make_codes()))
    list(islice(fit, 16))  # of 64 steps
    quarter = {name: value.clone() for name, value in prior.velocity.state_dict().items()}
    list(fit)
    assert all(torch.equal(value, quarter[name]) for name, value in prior.early.state_dict().items())
    noise = torch.randn(5, 2)
    now = prior.velocity(noise, torch.zeros(5))
    early = prior.early(noise, torch.zeros(5))
    *_, end = prior.path(noise)
    torch.testing.assert_close(end, noise + 2.5 * now - 1.5 * early)
    again = build(config)
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again.solve(noise), prior.solve(noise))


@pytest.mark.parametrize("shape", [(3,), (3, 5, 5), (2, 8, 8), (1, 16, 16), (1, 32, 32)])
def test_a_flow_fits_any_code(shape):
    flow = Flow(FlowConfig(width=8, depth=2, steps=3), shape)
    noise = torch.randn(4, *shape)
    assert flow.velocity(noise, torch.rand(4)).shape == noise.shape == flow.whiten(noise).shape
    torch.testing.assert_close(flow.solve(noise), noise)
    torch.nn.init.ones_(flow.velocity.outer.bias)  # a velocity of 1 everywhere
    torch.testing.assert_close(flow.solve(noise), noise + 1)


def ridged(variances: torch.Tensor) -> torch.Tensor:
    """Variances of whitened codes: near 1, but for directions of little spread."""
    return variances / (variances + RIDGE * variances.mean())


def test_whitened_codes_have_no_spread_of_their_own():
    mixed = torch.einsum("ij,njhw->nihw", torch.randn(4, 4), torch.randn(500, 4, 6, 6)) + 5
    prior = build(shape=(4, 6, 6))
    list(islice(prior.fit(Codes.of(mixed)), 1))
    white = prior.whiten(mixed).transpose(0, 1).flatten(1)
    spread = torch.linalg.eigvalsh(mixed.transpose(0, 1).flatten(1).cov())
    torch.testing.assert_close(torch.linalg.eigvalsh(white.cov()), ridged(spread), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.mean(1), torch.zeros(4), atol=1e-3, rtol=0)


def test_of_many_directions_the_leading_ones_are_modelled(monkeypatch):
    monkeypatch.setattr(flows, "DIRECTIONS", 2)
    spread = torch.tensor([0.01, 3.0, 0.02, 2.0, 0.03])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    mixed = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1)) * spread @ turn + 1
    prior = fitted(FlowConfig(width=16, depth=1, passes=1), mixed)
    assert prior.noise_shape == (2,)
    white = prior.whiten(mixed)
    back = white @ prior.outward.T + prior.mean
    assert 0 < float((back - mixed).square().mean(0).sum()) < 0.002
    assert prior.draw(0, 0, torch.arange(7), "cpu").shape == (7, 5)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_learn_what_one_would(world):
    """Ranks in turn, each with the sum of all gradients, as a reduction gives it."""
    codes = make_codes()
    barrier = threading.Barrier(world)
    parts: dict[int, torch.Tensor] = {}

    priors = [build(TAUGHT_SETTINGS) for _ in range(world)]  # first weights come from one generator of all threads

    def fit(rank: int) -> Flow:
        def add(value: torch.Tensor) -> torch.Tensor:
            parts[rank] = value
            barrier.wait(30)
            whole = torch.stack([parts[other] for other in range(world)]).sum(0)
            barrier.wait(30)
            return whole

        ranks = Codes(sizes=(len(codes),), read=lambda _: (codes, None), rank=rank, world=world, add=add)
        list(priors[rank].fit(ranks))
        return priors[rank]

    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(fit, range(world)))
    alone = fitted(TAUGHT_SETTINGS)
    for prior in ranks:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(prior.state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_a_model_draws_by_its_flow_again_where_other_steps_are_asked_for(tmp_path):
    prior = fitted(TAUGHT_SETTINGS, torch.randn(256, 6))
    settings = {name: getattr(TAUGHT_SETTINGS, name) for name in TAUGHT_SETTINGS.__dataclass_fields__}
    metadata = {"shape": [1, 8, 8], "prior": settings, "model": {"name": "conv", "width": 8, "code": 6}}
    state = {f"prior.{name}": value for name, value in prior.state_dict().items()}
    NAIGN(build_network(ConvConfig(width=8, code=6), (1, 8, 8)), metadata, state).save_pretrained(tmp_path)
    model = NAIGN.from_pretrained(tmp_path)
    assert int(model.prior.phase) == TAUGHT
    finer = model.with_flow(steps=9)
    assert finer.prior.config.steps == 9 and not finer.prior.config.student
    assert not torch.equal(finer.sample(3), model.sample(3))
    finer.save_pretrained(tmp_path / "finer")
    assert torch.equal(NAIGN.from_pretrained(tmp_path / "finer").sample(3), finer.sample(3))
