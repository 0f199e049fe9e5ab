"""A rank that the others wait for is named, once, when it stays the same one."""

import pytest

from naign.observe import stragglers
from naign.observe.stragglers import Stragglers

HOSTS = ["one", "one", "two", "two"]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that tests set."""
    now = [0.0]
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: now[0])
    return now


def seconds(**phases):
    """What four ranks need for each phase, where rank 3 needs what is given and the others one second."""
    others = dict.fromkeys(phases, 1.0)
    return [others, others, others, phases]


def test_a_slow_rank_is_named_once(clock, caplog):
    compared = Stragglers(HOSTS)
    for now in range(0, 400, 40):
        clock[0] = now
        assert compared.compare(seconds(take=3.0, fit=1.5), 10.0) == pytest.approx(0.2)
    (record,) = caplog.records
    said = "rank 3 on two is slow in phase take: 3 s a round, where others need 1; all wait for it, 20 % of the time"
    assert record.getMessage().startswith(said)


def test_ranks_that_are_slow_in_turns_or_little_are_not_named(clock, caplog):
    compared = Stragglers(HOSTS)
    for now in range(0, 2000, 100):
        clock[0] = now
        slow = seconds(take=3.0)
        compared.compare(slow[::-1] if now % 200 else slow, 10.0)
    for now in range(2000, 4000, 100):
        clock[0] = now
        assert compared.compare(seconds(take=1.9), 10.0) == pytest.approx(0.09)
    assert not caplog.records
