"""How many rounds a run has, as the training, the launcher and `naign runs` ask."""

from pipeline.settings.budget import count_network_rounds, count_rounds

SETTINGS = {"train.images": 1000, "match.round": 64, "train.passes": 2}


def test_the_budget_is_spent_in_whole_rounds():
    assert count_rounds(SETTINGS) == 8
    assert [count_network_rounds(SETTINGS | {"prior.alone": alone}) for alone in (0.0, 0.3)] == [8, 6]
