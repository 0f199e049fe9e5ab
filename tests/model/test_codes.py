"""The law of latents that is learned: a flow from noise to the codes of the data."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import InputError
from pipeline.model import latents
from pipeline.model.codes import WARMUP, CodeLaw, CodesConfig
from pipeline.model.flow import RIDGE, CodeFlow
from pipeline.model.naign import NAIGN
from pipeline.model.networks import ConvConfig, build_network

SETTINGS = CodesConfig(width=64, depth=2, passes=8, batch=128, steps=6, begin=0.0)


def codes(round: int, count: int = 1024) -> torch.Tensor:
    """Two clusters, of one and three quarters of the codes, in which the second value is twice the first."""
    generator = torch.Generator().manual_seed(round)
    first = torch.randn(count, generator=generator) * 0.1 + 3 * (torch.arange(count) % 4 > 0)
    return torch.stack([first, 2 * first + 0.1 * torch.randn(count, generator=generator)], dim=1)


def learned(rounds: int) -> CodeLaw:
    law = CodeLaw((2,), SETTINGS, seed=3, device=torch.device("cpu"))
    for round in range(rounds):
        learn(law, codes(round), 0.0)
        assert 0 < law.loss < 2.1
    return law


def learn(law: CodeLaw, codes: torch.Tensor, share: float, steps: int = 10**9, **options: object) -> None:
    for _ in zip(range(steps), law.learn(codes, share, **options), strict=False):
        pass


def test_the_flow_learns_clusters_and_their_shares():
    drawn = CodeFlow.of(learned(20).state()).draw(torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)))
    share = float((drawn[:, 0] > 1.5).float().mean())
    assert 0.68 < share < 0.82
    between = ((drawn[:, 0] > 0.7) & (drawn[:, 0] < 2.3)).float().mean()
    assert between < 0.05
    assert float((drawn[:, 1] - 2 * drawn[:, 0]).std()) < 0.5


def test_the_learning_rate_falls_from_step_to_step_of_a_round():
    law, rates = CodeLaw((2,), SETTINGS, seed=3, device=torch.device("cpu")), list[float]()
    for share in (0.0, 0.5):
        for _ in law.learn(codes(0), share, covers=0.5):
            rates.append(law.adam.param_groups[0]["lr"] / min(1.0, len(rates) / WARMUP + 1 / WARMUP))
    whole = [SETTINGS.lr * (1 + math.cos(math.pi * step / len(rates))) / 2 for step in range(len(rates))]
    assert rates == pytest.approx(whole)


def test_learning_goes_on_bit_for_bit():
    law, other = learned(4), CodeLaw((2,), SETTINGS, seed=3, device=torch.device("cpu"))
    for step in (1, 3):  # from the middle of a round, too
        other.load({name: value.clone() for name, value in law.dump().items()})
        assert (other.rounds, other.done) == (law.rounds, law.done)
        learn(law, codes(4), 0.5, steps=step, covers=0.1)
    learn(law, codes(4), 0.5, covers=0.1)
    learn(other, codes(4), 0.5, covers=0.1)
    assert other.loss == law.loss and other.rounds == 5
    for name, value in law.dump().items():
        assert torch.equal(value, other.dump()[name]), name


def test_steps_that_read_nothing_learn_alike():
    law, other = (CodeLaw((2,), SETTINGS, seed=3, device=torch.device("cpu")) for _ in range(2))
    other.ahead = True
    for one in (law, other):
        learn(one, codes(0), 0.0)
        learn(one, codes(1), 0.5, steps=3)
    assert isinstance(other.sum, torch.Tensor) and isinstance(other.loss, float)
    for name, value in law.dump().items():
        torch.testing.assert_close(value, other.dump()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 5, 5), (2, 8, 8), (1, 16, 16)])
def test_a_flow_fits_any_code_and_its_state_says_which(shape):
    flow = CodeFlow(shape, width=8, depth=2, steps=3)
    assert flow(torch.randn(4, *shape), torch.rand(4)).shape == (4, *shape)
    again = CodeFlow.of(flow.state_dict())
    noise = torch.randn(4, *shape)
    assert torch.equal(again.draw(noise), flow.draw(noise).detach())
    wanted = flow.whiten(noise)
    assert wanted.shape == noise.shape


def kept(variances: torch.Tensor) -> torch.Tensor:
    """Variances of whitened codes: near 1, but for directions of little spread."""
    return variances / (variances + RIDGE * variances.mean())


def test_whitened_codes_have_no_spread_of_their_own():
    law = CodeLaw((4, 6, 6), SETTINGS, 0, torch.device("cpu"))
    mixed = torch.einsum("ij,njhw->nihw", torch.randn(4, 4), torch.randn(500, 4, 6, 6)) + 5
    learn(law, mixed, 0.0, steps=1)
    white, values = (codes.transpose(0, 1).flatten(1) for codes in (law.flow.whiten(mixed), mixed))
    spread = torch.linalg.eigvalsh(values.cov())
    torch.testing.assert_close(torch.linalg.eigvalsh(white.cov()), kept(spread), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.mean(1), torch.zeros(4), atol=1e-3, rtol=0)


def test_of_many_directions_the_leading_ones_are_modelled():
    spread = torch.tensor([0.01, 3.0, 0.02, 2.0, 0.03])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    mixed = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1)) * spread @ turn + 1
    law = CodeLaw((5,), CodesConfig(width=16, depth=1, passes=1, directions=2, begin=0.0), 0, torch.device("cpu"))
    learn(law, mixed, 0.0)
    assert law.flow.noise_shape == (2,)
    white = law.flow.whiten(mixed)
    expected = kept(torch.linalg.eigvalsh(mixed.T.cov()))[-2:]
    assert expected.min() > 0.6
    torch.testing.assert_close(torch.linalg.eigvalsh(white.T.cov()), expected, atol=1e-3, rtol=0)
    back = white @ law.flow.outward.T + law.flow.mean
    assert 0 < float((back - mixed).square().mean(0).sum()) < 0.002
    again = CodeFlow.of(law.state())
    assert again.noise_shape == (2,) and again.draw(torch.randn(7, 2)).shape == (7, 5)


def test_whitened_codes_move_little_while_the_codes_turn():
    """Two directions of the same spread: their eigenvectors are any; what is learned from must not turn with them."""
    law = CodeLaw((3,), CodesConfig(width=16, depth=1, passes=1, directions=2, begin=0.0), 0, torch.device("cpu"))
    mixed = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1.0, 0.01])
    learn(law, mixed, 0.0)
    white = law.flow.whiten(mixed)
    for bump in (torch.tensor([1.02, 1.0, 1.0]), torch.tensor([1.0, 1.05, 1.0])):
        learn(law, mixed * bump, 0.0)
        assert float((law.flow.whiten(mixed) - white).square().mean()) < 0.002


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_learn_what_one_would(world):
    """Ranks in turn, each with the sum of all gradients, as a reduction gives it."""
    alone = CodeLaw((2,), SETTINGS, seed=3, device=torch.device("cpu"))
    laws = [CodeLaw((2,), SETTINGS, seed=3, device=torch.device("cpu")) for _ in range(world)]
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

            learn(laws[rank], codes(0), 0.0, rank=rank, world=world, add=add)

        list(pool.map(work, range(world)))
    learn(alone, codes(0), 0.0)
    for law in laws:
        assert law.loss == pytest.approx(alone.loss, rel=1e-5)
        for name, value in alone.state().items():
            torch.testing.assert_close(law.state()[name], value, atol=1e-4, rtol=1e-4)


def test_before_it_begins_the_flow_draws_a_gaussian_of_the_codes_mean_and_covariance():
    law = CodeLaw((2,), CodesConfig(width=16, depth=1, begin=0.5), 3, torch.device("cpu"))
    before = {name: value.clone() for name, value in law.flow.named_parameters()}
    learn(law, codes(0), 0.49)
    assert law.rounds == 1 and math.isnan(law.loss)
    assert all(torch.equal(value, before[name]) for name, value in law.flow.named_parameters())
    drawn = CodeFlow.of(law.state()).draw(torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)))
    covariance = codes(0).T.cov()
    expected = covariance + RIDGE * covariance.trace() / 2 * torch.eye(2)
    torch.testing.assert_close(drawn.T.cov(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(drawn.mean(0), codes(0).mean(0), atol=0.1, rtol=0)
    learn(law, codes(1), 0.5)
    assert law.rounds == 2 and 0 < law.loss < 4


def test_first_weights_change_nothing_that_is_drawn_besides():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    CodeLaw((2,), SETTINGS, seed=3, device=torch.device("cpu"))
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("change", ["another width", "a moment is missing", "a moment of another shape"])
def test_what_another_flow_left_is_refused(change):
    saved = learned(1).dump()
    law = CodeLaw(
        (2,), CodesConfig(width=32, begin=0.0) if change == "another width" else SETTINGS, 3, torch.device("cpu")
    )
    if change == "a moment is missing":
        del saved["adam.exp_avg.velocity.outer.weight"]
    if change == "a moment of another shape":
        saved["adam.exp_avg_sq.velocity.outer.weight"] = torch.zeros(3)
    with pytest.raises((KeyError, ValueError)):
        law.load(saved)


@pytest.mark.parametrize("steps", [0, -5, 10**13])
def test_a_state_without_sensible_steps_is_refused(steps):
    with pytest.raises(ValueError, match="steps from noise to a code"):
        CodeFlow.of(learned(0).state() | {"steps": torch.tensor(steps)})


def model(code: int = 16, dims: int = 16) -> NAIGN:
    config = ConvConfig(width=8, code=code)
    law = CodeLaw((dims,), SETTINGS, 0, torch.device("cpu"))
    learn(law, torch.randn(256, dims), 0.0)
    metadata = {"shape": [1, 8, 8], "latents": "codes"}
    metadata["model"] = {"name": "conv", "width": 8, "code": code}
    return NAIGN(build_network(config, (1, 8, 8)), metadata, law.state())


def test_latents_are_decoded_codes_and_travel_with_the_model(tmp_path):
    first = model()
    first.save_pretrained(tmp_path)
    second = NAIGN.from_pretrained(tmp_path)
    assert torch.equal(first.sample(7, seed=2), second.sample(7, seed=2))
    assert {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("latents.")}
    drawn = second.latent(torch.tensor([5, 3]), seed=2)
    torch.testing.assert_close(drawn, second.latent(torch.arange(7), seed=2)[[5, 3]])
    flow = CodeFlow.of(second.state)
    noise = latents.normal(2, 2**32 - 1, torch.tensor([5, 3]), (16,))
    torch.testing.assert_close(drawn, second.network.decode(flow.draw(noise)))


def test_the_codes_of_another_network_are_refused(tmp_path):
    model(code=16, dims=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not hold the model"):
        NAIGN.from_pretrained(tmp_path)
