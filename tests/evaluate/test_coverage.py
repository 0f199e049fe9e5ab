"""Precision, recall, density and coverage on cases with known answers, and against a naive implementation."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from naign.evaluate import coverage as module
from naign.evaluate.coverage import coverage, mode_shares
from tests.match.problems import draw


def _naive(real, samples, k):
    """The definitions of the two papers, all distances at once in float64."""

    real_radii = np.sort(cdist(real, real), axis=1)[:, k]
    sample_radii = np.sort(cdist(samples, samples), axis=1)[:, k]
    between = cdist(real, samples)
    inside = between <= real_radii[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (between <= sample_radii).any(1).mean(),
        "density": inside.sum() / k / len(samples),
        "coverage": inside.any(1).mean(),
    }


def test_agrees_with_the_definitions(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 37)  # several blocks, the last one short
    real = draw(0, 211, 6)
    samples = 0.3 + 0.8 * draw(1, 173, 6)
    found = coverage(real, samples)
    expected = _naive(real.double().numpy(), samples.double().numpy(), 5)
    assert found == pytest.approx(expected, abs=1e-12)


def test_equal_sets_are_complete():
    real = draw(0, 300, 4)
    found = coverage(real, real)
    assert found.pop("density") == pytest.approx(6 / 5)  # every ball holds its k neighbours and its own centre
    assert set(found.values()) == {1}
    apart = coverage(real + 1000, real)
    assert set(apart.values()) == {0}


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="more than k = 5"):
        coverage(draw(0, 5, 2), draw(0, 50, 2))


def test_mode_shares_count_the_likeliest_class():
    logits = torch.eye(4)[[0, 0, 1, 3]] * 7
    assert mode_shares(logits) == [0.5, 0.25, 0, 0.25]


def test_a_shared_offset_changes_nothing():
    real = draw(0, 200, 8)
    samples = draw(1, 200, 8)
    plain = coverage(real, samples)
    moved = coverage(real + 1000, samples + 1000)
    assert moved == pytest.approx(plain, abs=0.011)  # the input itself lost digits
