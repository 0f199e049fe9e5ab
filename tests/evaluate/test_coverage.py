"""Precision, recall, density and coverage on cases with known answers, and against a naive implementation."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from naign.evaluate import coverage as module
from naign.evaluate.coverage import coverage, mode_shares, nearest


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    real = _normal(211, 6, seed=0)
    samples = 0.3 + 0.8 * _normal(173, 6, seed=1)
    found = coverage(real, samples, k=5)
    expected = _naive(real.double().numpy(), samples.double().numpy(), 5)
    assert found == pytest.approx(expected, abs=1e-12)


def test_equal_sets_are_complete():
    real = _normal(300, 4, seed=0)
    found = coverage(real, real, k=5)
    assert found.pop("density") == pytest.approx(6 / 5)  # every ball holds its k neighbours and its own centre
    assert set(found.values()) == {1}
    apart = coverage(real + 1000, real, k=5)
    assert set(apart.values()) == {0}


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="more than k = 5"):
        coverage(_normal(5, 2, seed=0), _normal(50, 2, seed=0))


def test_mode_shares_count_the_likeliest_class():
    logits = torch.eye(4)[[0, 0, 1, 3]] * 7
    assert mode_shares(logits) == [0.5, 0.25, 0, 0.25]


def test_nearest_finds_the_copy_and_its_exact_distance():
    reference = _normal(200, 1, 4, 4, seed=0) + 50
    distances, indices = nearest(reference[[150, 3]], reference)
    assert indices.tolist() == [150, 3]
    assert distances.tolist() == [0, 0]


def test_a_shared_offset_changes_nothing():
    real = _normal(200, 8, seed=0)
    samples = _normal(200, 8, seed=1)
    plain = coverage(real, samples)
    moved = coverage(real + 1000, samples + 1000)
    assert moved == pytest.approx(plain, abs=0.011)  # the input itself lost digits
