"""The prior that is learned by gradient descent: a flow from noise to the codes of the data."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from naign.errors import InputError
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network
from naign.model.prior import Examples
from naign.model.prior import flow as flows
from naign.model.prior.flow import RIDGE, Flow, FlowConfig
from naign.model.prior.learner import WARMUP
from naign.philox import normal

SETTINGS = FlowConfig(width=64, depth=2, passes=8, batch=128, steps=6, begin=0.0)


def codes(round: int, count: int = 1024) -> torch.Tensor:
    """Two clusters, of one and three quarters of the codes, in which the second value is twice the first."""
    generator = torch.Generator().manual_seed(round)
    first = torch.randn(count, generator=generator) * 0.1 + 3 * (torch.arange(count) % 4 > 0)
    return torch.stack([first, 2 * first + 0.1 * torch.randn(count, generator=generator)], dim=1)


def build(shape: tuple[int, ...] = (2,), config: FlowConfig = SETTINGS) -> Flow:
    return Flow(config, shape, seed=3).requires_grad_(False)


def learned(rounds: int) -> Flow:
    prior = build()
    for round in range(rounds):
        learn(prior, codes(round), round=round)
    return prior


def learn(prior: Flow, codes: torch.Tensor, steps: int = 10**9, **settings: object) -> None:
    for _ in zip(range(steps), prior.learn(Examples(images=codes, **settings)), strict=False):  # type: ignore[arg-type]
        pass


@pytest.mark.slow
def test_the_flow_learns_clusters_and_their_shares():
    # At first the velocity is 0, and the loss what whitening leaves of the codes and 1 of the noise.
    assert 1.2 < learned(1).metrics["loss/codes"] < 1.45
    prior = learned(20)
    assert prior.metrics["loss/codes"] < 0.65
    drawn = prior.draw(0, 0, torch.arange(4000), "cpu")
    share = float((drawn[:, 0] > 1.5).float().mean())
    assert 0.68 < share < 0.82
    between = ((drawn[:, 0] > 0.7) & (drawn[:, 0] < 2.3)).float().mean()
    assert between < 0.05
    assert float((drawn[:, 1] - 2 * drawn[:, 0]).std()) < 0.5


def test_the_learning_rate_falls_from_step_to_step_of_a_round():
    prior, rates = build(), list[float]()
    for progress in (0.0, 0.5):
        for _ in prior.learn(Examples(images=codes(0), progress=progress, covers=0.5)):
            rates.append(prior.learner.adam.param_groups[0]["lr"] / min(1.0, len(rates) / WARMUP + 1 / WARMUP))
    whole = [SETTINGS.lr * (1 + math.cos(math.pi * step / len(rates))) / 2 for step in range(len(rates))]
    assert rates == pytest.approx(whole)


def test_learning_goes_on_bit_for_bit():
    prior, other = learned(4), build()
    for step in (1, 3):  # from the middle of a round, too
        other.load_training_state({name: value.clone() for name, value in prior.training_state().items()})
        assert other.learner.done == prior.learner.done and other.metrics == prior.metrics
        learn(prior, codes(4), steps=step, round=4, progress=0.5, covers=0.1)
    for one in (prior, other):
        learn(one, codes(4), round=4, progress=0.5, covers=0.1)
    assert other.metrics == prior.metrics and other.learner.made == prior.learner.made
    for name, value in prior.training_state().items():
        assert torch.equal(value, other.training_state()[name]), name


def test_steps_that_read_nothing_learn_alike():
    prior, other = build(), build()
    other.learner.ahead = True
    for one in (prior, other):
        learn(one, codes(0))
        learn(one, codes(1), steps=3, round=1, progress=0.5)
    assert isinstance(other.learner.sum, torch.Tensor) and isinstance(other.metrics["loss/codes"], float)
    for name, value in prior.training_state().items():
        torch.testing.assert_close(value, other.training_state()[name], rtol=1e-3, atol=1e-5)


def test_autoguidance_moves_away_from_what_the_flow_was_after_a_quarter_of_its_training():
    config, weights = replace(SETTINGS, begin=0.2, steps=1, autoguidance=1.5), dict[float, dict[str, torch.Tensor]]()
    prior, resumed = build(config=config), build(config=config)
    noise = torch.randn(5, 2)
    for round, progress in enumerate((0.2, 0.4, 0.6, 0.8)):  # a quarter of its 256 steps is at 0.4
        weights[progress] = {name: value.clone() for name, value in prior.velocity.state_dict().items()}
        learn(resumed, codes(round), steps=round, round=round, progress=progress, covers=0.2)
        resumed.load_training_state({name: value.clone() for name, value in resumed.training_state().items()})
        assert prior.guides == (round > 1)
        for one in (prior, resumed):
            learn(one, codes(round), round=round, progress=progress, covers=0.2)
    assert all(torch.equal(value, weights[0.4][name]) for name, value in prior.early.state_dict().items())
    assert all(torch.equal(value, resumed.training_state()[name]) for name, value in prior.training_state().items())
    now, early = (network(noise, torch.zeros(5)) for network in (prior.velocity, prior.early))
    torch.testing.assert_close(prior.ends(noise), noise + 2.5 * now - 1.5 * early)
    again = build(config=config)
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again.ends(noise), prior.ends(noise))
    assert not [name for name in learned(1).training_state() if name.startswith("early")]


def test_the_first_step_is_none_to_move_away_from():
    """In a run so short that it begins after a quarter of the flow's training."""
    prior, other = (build(config=replace(SETTINGS, begin=0.3, autoguidance=1.0)) for _ in range(2))
    learn(prior, codes(0), progress=0.5, covers=0.5)
    learn(other, codes(0), steps=2, progress=0.5, covers=0.5)
    other.load_training_state({name: value.clone() for name, value in other.training_state().items()})
    learn(other, codes(0), progress=0.5, covers=0.5)
    assert prior.guides and prior.early.outer.weight.any()
    assert all(torch.equal(value, other.training_state()[name]) for name, value in prior.training_state().items())


@pytest.mark.parametrize("shape", [(3,), (3, 5, 5), (2, 8, 8), (1, 16, 16), (1, 32, 32)])
def test_a_flow_fits_any_code(shape):
    flow = Flow(FlowConfig(width=8, depth=2, steps=3), shape)
    noise = torch.randn(4, *shape)
    assert flow.velocity(noise, torch.rand(4)).shape == noise.shape == flow.whiten(noise).shape
    torch.testing.assert_close(flow.solve(noise), noise)
    torch.nn.init.ones_(flow.velocity.outer.bias)  # a velocity of 1 everywhere
    again = Flow(flow.config, shape)
    again.load_state_dict(flow.state_dict())
    torch.testing.assert_close(again.solve(noise), noise + 1)


def kept(variances: torch.Tensor) -> torch.Tensor:
    """Variances of whitened codes: near 1, but for directions of little spread."""
    return variances / (variances + RIDGE * variances.mean())


def test_whitened_codes_have_no_spread_of_their_own():
    prior = build((4, 6, 6))
    mixed = torch.einsum("ij,njhw->nihw", torch.randn(4, 4), torch.randn(500, 4, 6, 6)) + 5
    learn(prior, mixed, steps=1)
    white, values = (codes.transpose(0, 1).flatten(1) for codes in (prior.whiten(mixed), mixed))
    spread = torch.linalg.eigvalsh(values.cov())
    torch.testing.assert_close(torch.linalg.eigvalsh(white.cov()), kept(spread), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.mean(1), torch.zeros(4), atol=1e-3, rtol=0)


def test_of_many_directions_the_leading_ones_are_modelled(monkeypatch):
    monkeypatch.setattr(flows, "DIRECTIONS", 2)
    spread = torch.tensor([0.01, 3.0, 0.02, 2.0, 0.03])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    mixed = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1)) * spread @ turn + 1
    prior = build((5,), FlowConfig(width=16, depth=1, passes=1, begin=0.0))
    learn(prior, mixed)
    assert prior.noise_shape == (2,)
    white = prior.whiten(mixed)
    expected = kept(torch.linalg.eigvalsh(mixed.T.cov()))[-2:]
    assert expected.min() > 0.6
    torch.testing.assert_close(torch.linalg.eigvalsh(white.T.cov()), expected, atol=1e-3, rtol=0)
    back = white @ prior.outward.T + prior.mean
    assert 0 < float((back - mixed).square().mean(0).sum()) < 0.002
    assert prior.draw(0, 0, torch.arange(7), "cpu").shape == (7, 5)


def test_whitened_codes_move_little_while_the_codes_turn(monkeypatch):
    """Two directions of the same spread: their eigenvectors are any; what is learned from must not turn with them."""
    monkeypatch.setattr(flows, "DIRECTIONS", 2)
    prior = build((3,), FlowConfig(width=16, depth=1, passes=1, begin=0.0))
    mixed = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1.0, 0.01])
    learn(prior, mixed)
    white = prior.whiten(mixed)
    for round, bump in enumerate((torch.tensor([1.02, 1.0, 1.0]), torch.tensor([1.0, 1.05, 1.0])), 1):
        learn(prior, mixed * bump, round=round)
        assert float((prior.whiten(mixed) - white).square().mean()) < 0.002


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_learn_what_one_would(world):
    """Ranks in turn, each with the sum of all gradients, as a reduction gives it."""
    alone, priors = build(), [build() for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        barrier, parts = threading.Barrier(world), list[torch.Tensor]()

        def work(rank: int) -> None:
            def add(value: torch.Tensor) -> torch.Tensor:
                parts.append(value)
                barrier.wait()
                whole = torch.stack(sorted(parts, key=lambda part: float(part[0]))).sum(0)
                if barrier.wait() == 0:
                    parts.clear()
                barrier.wait()
                return whole

            learn(priors[rank], codes(0), rank=rank, world=world, add=add)

        list(pool.map(work, range(world)))
    learn(alone, codes(0))
    for prior in priors:
        assert prior.metrics == pytest.approx(alone.metrics, rel=1e-5)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(prior.state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_before_it_begins_the_flow_draws_a_gaussian_of_the_codes_mean_and_covariance():
    prior = build((2,), FlowConfig(width=16, depth=1, begin=0.5))
    before = {name: value.clone() for name, value in prior.named_parameters()}
    learn(prior, codes(0), progress=0.49)
    assert prior.metrics == {} and not prior.moves
    assert all(torch.equal(value, before[name]) for name, value in prior.named_parameters())
    drawn = prior.draw(0, 0, torch.arange(20_000), "cpu")
    covariance = codes(0).T.cov()
    expected = covariance + RIDGE * covariance.trace() / 2 * torch.eye(2)
    torch.testing.assert_close(drawn.T.cov(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(drawn.mean(0), codes(0).mean(0), atol=0.1, rtol=0)
    learn(prior, codes(1), round=1, progress=0.5)
    assert prior.moves and prior.learner.made == 16 and 1 < prior.metrics["loss/codes"] < 2


@pytest.mark.parametrize("stride", [1, 4])
def test_before_it_begins_a_part_of_the_images_is_enough(stride):
    prior, encoded = build((2,), FlowConfig(width=16, depth=1, begin=0.5)), list[int]()

    def encode(images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return images

    for progress in (0.4, 0.5):
        for _ in prior.learn(Examples(images=codes(0), encode=encode, progress=progress, stride=stride)):
            pass
    assert encoded == [512] * (2 // stride) + [256] * (stride // 4) + [512, 512]


def test_first_weights_change_nothing_that_is_drawn_besides():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.randn(3), expected)


def model(code: int = 16, dims: int = 16) -> NAIGN:
    prior = Flow(SETTINGS, (dims,), seed=0)
    learn(prior, torch.randn(256, dims))
    settings = {"name": "flow", "width": 64, "depth": 2, "steps": 6}
    metadata = {"shape": [1, 8, 8], "prior": settings, "model": {"name": "conv", "width": 8, "code": code}}
    return NAIGN(build_network(ConvConfig(width=8, code=code), (1, 8, 8)), metadata, prior.state_dict())


def test_latents_are_decoded_codes_and_travel_with_the_model(tmp_path):
    first = model()
    first.save_pretrained(tmp_path)
    second = NAIGN.from_pretrained(tmp_path)
    assert torch.equal(first.sample(7, seed=2), second.sample(7, seed=2))
    assert {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("prior.")}
    ids = torch.tensor([5, 3])
    drawn = second.latent(ids, seed=2)
    torch.testing.assert_close(drawn, second.latent(torch.arange(7), seed=2)[[5, 3]])
    noise = normal(2, 2**32 - 1, ids, (16,))
    torch.testing.assert_close(drawn, second.network.decode(second.prior.solve(noise)))


@pytest.mark.parametrize("change", ["steps", "width", "code"])
def test_a_prior_that_does_not_fit_its_state_is_refused(tmp_path, change):
    made = model()
    if change == "code":  # a state of another network's codes
        made.prior.register_buffer("mean", torch.zeros(8))
    else:
        made.metadata["prior"][change] = {"steps": -5, "width": 10**12}[change]
    made.save_pretrained(tmp_path)
    refused = {"steps": "prior.steps is -5", "width": "prior.width is", "code": "does not hold the model"}
    with pytest.raises(InputError, match=refused[change]):
        NAIGN.from_pretrained(tmp_path)
