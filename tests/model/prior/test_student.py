"""The student of a flow: two evaluations from noise to a code."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from naign.errors import InputError
from naign.model.prior import Examples
from naign.model.prior.flow import Flow, FlowConfig
from naign.model.prior.student import MIDDLE, TaughtFlow

ROUNDS = 10  # of which the student has the last four
SETTINGS = FlowConfig(
    width=64, depth=2, passes=8, batch=128, steps=5, begin=0.0, alone=0.5, student=0.4
)  # fmt: skip


def codes(round: int, count: int = 1024) -> torch.Tensor:
    """Two clusters, of one and three quarters of the codes."""
    generator = torch.Generator().manual_seed(round)
    first = torch.randn(count, generator=generator) * 0.1 + 3 * (torch.arange(count) % 4 > 0)
    return torch.stack([first, torch.randn(count, generator=generator)], dim=1)


def build(config: FlowConfig = SETTINGS) -> TaughtFlow:
    return TaughtFlow(config, (2,), seed=3).requires_grad_(False)


def learn(prior: TaughtFlow, round: int, *, steps: int = 10**9, rounds: int = ROUNDS, **settings: object) -> None:
    examples = Examples(
        images=codes(round), round=round, progress=round / rounds, covers=1 / rounds, **settings  # type: ignore[arg-type]
    )  # fmt: skip
    for _ in zip(range(steps), prior.learn(examples), strict=False):
        pass


def learned(rounds: int) -> TaughtFlow:
    prior = build()
    for round in range(rounds):
        learn(prior, round)
    return prior


def test_the_student_learns_after_the_flow_and_draws_by_two_evaluations():
    prior, taught = build(), list[bool]()
    ids = torch.arange(4000)
    for round in range(ROUNDS):
        if round == 6:
            velocity = {name: value.clone() for name, value in prior.velocity.state_dict().items()}
            paths = prior.draw(0, 0, ids, "cpu")
        learn(prior, round)
        taught.append(prior.taught)
        assert set(prior.metrics) == {"loss/student" if round >= 6 else "loss/codes"}
    assert taught == [False] * 6 + [True] * 4
    assert all(torch.equal(value, velocity[name]) for name, value in prior.velocity.state_dict().items())
    evaluations: list[float] = []
    prior.student.register_forward_pre_hook(lambda _, given: evaluations.extend(given[1].unique().tolist()))
    drawn = prior.draw(0, 0, ids, "cpu")
    assert evaluations == pytest.approx([0.0, MIDDLE])
    assert float((drawn - paths).abs().mean()) < 0.35  # of codes whose standard deviations are 1.3 and 1
    untaught = build()
    untaught.load_state_dict(prior.state_dict() | {f"student.{name}": value for name, value in velocity.items()})
    assert float((untaught.draw(0, 0, ids, "cpu") - paths).abs().mean()) > 2 * float((drawn - paths).abs().mean())
    again = build()
    again.load_state_dict(prior.state_dict())
    assert again.taught and torch.equal(again.draw(0, 0, ids, "cpu"), drawn)


def test_the_student_follows_a_guided_flow():
    """And needs no codes of the data."""
    prior, encoded = build(replace(SETTINGS, autoguidance=1.0)), list[int]()
    for round in range(ROUNDS):
        learn(prior, round, encode=lambda images, round=round: encoded.append(round) or images)
    assert set(encoded) == set(range(6))
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    drawn, guided = prior.ends(noise), Flow.ends(prior, noise)
    prior.guides = False
    assert float((drawn - guided).abs().mean()) < 0.8 * float((drawn - Flow.ends(prior, noise)).abs().mean())


def test_a_run_that_begins_from_another_models_prior_teaches_its_own_student():
    """And keeps its own early weights for guidance."""
    guided = replace(SETTINGS, autoguidance=1.0)
    ended = build(guided)
    for round in range(ROUNDS):
        learn(ended, round)
    begun, noise = build(guided), torch.randn(50, 2)
    begun.load_state_dict(ended.state_dict())
    assert begun.taught and begun.guides
    learn(begun, 0)
    assert not begun.taught and not begun.guides and begun.learner.made == 64
    assert torch.equal(begun.ends(noise), Flow.ends(begun, noise))
    for round in range(1, ROUNDS):
        learn(begun, round)
    assert begun.taught and begun.guides and begun.learner.made == 4 * 64
    assert not torch.equal(begun.early.inner.weight, ended.early.inner.weight)


def test_a_run_that_is_longer_now_goes_on_with_its_flow():
    prior = learned(ROUNDS)
    learn(prior, ROUNDS, rounds=2 * ROUNDS)
    assert not prior.taught and set(prior.metrics) == {"loss/codes"}
    assert prior.metrics["loss/codes"] < 1.05 * learned(6).metrics["loss/codes"]


@pytest.mark.parametrize("round", [6, 7, 9])
def test_learning_goes_on_bit_for_bit(round):
    prior, other = learned(round), build()
    for step in (1, 30):  # from the middle of a round, too, and of the first one
        learn(prior, round, steps=step)
        other.load_training_state({name: value.clone() for name, value in prior.training_state().items()})
        assert (other.taught, other.learner.done, other.metrics) == (prior.taught, prior.learner.done, prior.metrics)
    for one in (prior, other):
        learn(one, round)
    assert other.metrics == prior.metrics
    for name, value in prior.training_state().items():
        torch.testing.assert_close(other.training_state()[name], value, atol=0, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_learn_what_one_would(world):
    """Ranks in turn, each with all rows of the others and the sum of all gradients, as collectives give them."""
    alone, start = build(), learned(6)
    images = codes(6, 1020)
    settings = {"round": 6, "progress": 0.6, "covers": 0.2}

    def run(prior: TaughtFlow, **given: object) -> None:
        prior.load_training_state({name: value.clone() for name, value in start.training_state().items()})
        for _ in prior.learn(Examples(**settings, **given)):  # type: ignore[arg-type]
            pass

    priors = [build() for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        barrier, parts = threading.Barrier(world), dict[int, torch.Tensor]()

        def exchange(rank: int, value: torch.Tensor) -> list[torch.Tensor]:
            parts[rank] = value
            barrier.wait()
            everyone = [parts[other] for other in range(world)]
            barrier.wait()
            return everyone

        def work(rank: int) -> None:
            run(
                priors[rank],
                images=images.tensor_split(world)[rank],
                rank=rank,
                world=world,
                gather=lambda rows: torch.cat(exchange(rank, rows)),
                add=lambda value: torch.stack(exchange(rank, value)).sum(0),
            )

        list(pool.map(work, range(world)))
    run(alone, images=images)
    assert alone.taught
    for prior in priors:
        assert prior.metrics == pytest.approx(alone.metrics, rel=1e-4)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(prior.state_dict()[name], value, atol=2e-3, rtol=2e-3)


def test_without_a_student_nothing_is_kept_for_one():
    prior = build(FlowConfig(width=16, depth=1))
    assert not [name for name in prior.training_state() if name.startswith("student")]


@pytest.mark.parametrize(
    ("settings", "rounds", "problem"),
    [
        ({"student": 0.6}, 10, "prior.student is 0.6, prior.alone 0.5"),
        ({"student": 0.2, "begin": 0.8, "alone": 0.2}, 10, "Lower prior.student"),
        (
            {"student": 0.05},
            10,
            "prior.student=0.05 leave the flow or its student none of 10 rounds.*to 20480 x train.passes, 20 rounds",
        ),
        ({"begin": 0.7, "alone": 0.3, "student": 0.3}, 10, "Lower prior.student"),
        ({"begin": 0.7, "alone": 0.3, "student": 0.25}, 12, "flow or its student none of 12 rounds.*14 rounds"),
        ({"student": 1e-8}, 10, "prior.student is 1e-08.*not below 1e-6"),
        ({"student": 1e-6}, 10, "flow or its student none of 10 rounds.*1000000 rounds"),
        ({"student": -0.1}, 10, "prior.student"),
    ],
)
def test_a_student_that_cannot_learn_is_refused(settings, rounds, problem):
    with pytest.raises(InputError, match=problem):
        FlowConfig(**settings).check_rounds(rounds, 1024)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"begin": 0.9, "alone": 0.1}, 10),
        ({"begin": 0.7, "alone": 0.3}, 4),
        ({"student": 0.3}, 4),
        ({"begin": 0.99, "alone": 0.0}, 100),
    ],
)
def test_the_least_number_of_rounds_is_named(settings, least):
    with pytest.raises(InputError, match=f"train.images to {least * 1024} x train.passes, {least} rounds"):
        FlowConfig(**settings).check_rounds(least - 1, 1024)
    FlowConfig(**settings).check_rounds(least, 1024)
