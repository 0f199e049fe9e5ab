"""When a run is done, as the training, the launcher and `naign runs` ask."""

import pytest

from naign.settings.budget import count_rounds, is_comparable, is_done, is_exhausted, measured_by

SETTINGS = {
    **{"train.images": 1000, "match.round": 64, "train.passes": 2, "quality.patience": 3, "quality.rounds": 2},
    **{"quality.samples": 2000, "quality.split": "train", "quality.encoder": "", "data.path": "x", "data.index": ""},
}


def test_the_budget_is_spent_in_whole_rounds():
    assert count_rounds(SETTINGS) == 8
    assert [is_done(SETTINGS, rounds, {}) for rounds in (7, 8)] == [False, True]


@pytest.mark.parametrize("changed", [{}, {"quality.samples": 100}, {"quality.split": "test"}, {"data.path": "y"}])
def test_patience_counts_from_a_best_that_was_measured_alike(changed):
    best = {"fd": 2.5, "round": 1, "measured": measured_by(SETTINGS)}
    ended = [is_exhausted(SETTINGS | changed, rounds, best) for rounds in (1, 6, 7)]
    assert ended == ([False, False, True] if not changed else [False] * 3)
    assert is_done(SETTINGS | changed, 7, best) == (not changed)


DAMAGE = [{"round": 0}, {"round": "1"}, {"round": None}, {"round": 8}, {"measured": {}}]
DAMAGE += [{"fd": fd} for fd in (float("nan"), float("inf"), "2.5", None)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_ends_no_run(damage):
    best = {"fd": 2.5, "round": 1, "measured": measured_by(SETTINGS)}
    assert is_comparable(SETTINGS, 7, best) and not is_comparable(SETTINGS, 7, best | damage)
    assert is_exhausted(SETTINGS, 7, best) and not is_exhausted(SETTINGS, 7, best | damage)
