"""A refactor must leave the loss traces as they are."""

import json

import pytest

from tests.conftest import environment, forked
from tests.golden import FILE, ROUNDS, TRACES, trace


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACES)
def test_the_golden_trace_is_reproduced(name, digits, tmp_path):
    expected = json.loads(FILE.read_text())[name]
    found = trace(name, digits, tmp_path / "run", environment() if name == "naign" else forked())
    assert len(found) == len(expected) >= ROUNDS
    for round, (now, then) in enumerate(zip(found, expected, strict=True)):
        # Other processors round differently in the last bits, which a few hundred steps cannot blow up to this.
        assert now == pytest.approx(then, rel=1e-4), f"round {round}"
