"""Frechet distance against closed forms and against scipy's general matrix root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from naign.errors import InputError
from naign.evaluate.frechet import frechet_distance, gaussian, gaussian_distance


def _spd(random: np.random.Generator, size: int) -> np.ndarray:
    root = random.normal(size=(size, size + 3))
    return root @ root.T / size


def _distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    return gaussian_distance(*(torch.from_numpy(np.asarray(part, float)) for part in (mean1, cov1, mean2, cov2)))


def test_one_dimension_is_the_textbook_formula() -> None:
    # N(m1, s1^2), N(m2, s2^2): (m1 - m2)^2 + (s1 - s2)^2
    assert _distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(9 + 9)


def test_diagonal_covariances_add_up_by_dimension() -> None:
    found = _distance([0, 0, 0], np.diag([1.0, 4, 9]), [1, 2, 3], np.diag([4.0, 4, 1]))
    assert found == pytest.approx(14 + 1 + 0 + 4)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_agrees_with_scipy_sqrtm(size: int) -> None:
    random = np.random.default_rng(size)
    mean1, mean2, cov1, cov2 = (
        random.normal(size=size),
        random.normal(size=size),
        _spd(random, size),
        _spd(random, size),
    )
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = np.square(mean1 - mean2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert _distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-8)
    assert _distance(mean2, cov2, mean1, cov1) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_are_exact() -> None:
    # A line along x against a line along y: nothing overlaps, so the traces remain.
    assert _distance([0, 0], np.diag([9.0, 0]), [0, 0], np.diag([0, 4.0])) == pytest.approx(13)
    assert _distance([0, 0], np.zeros((2, 2)), [3, 4], np.zeros((2, 2))) == pytest.approx(25)


def test_rank_deficient_features_do_not_turn_negative_or_nan() -> None:
    features = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))  # rank 4 in 64 dimensions
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 1) == pytest.approx(64, rel=1e-5)


def test_a_shift_counts_squared_and_a_scale_by_its_deviation() -> None:
    features = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)).double()
    variance = gaussian(features)[1].trace().item()
    assert frechet_distance(features, features + 2) == pytest.approx(12)
    centred = features - features.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance)


def test_gaussian_is_numpys_mean_and_covariance() -> None:
    features = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    mean, covariance = gaussian(torch.from_numpy(features))
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0))
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64).T))


def test_one_row_has_no_covariance() -> None:
    with pytest.raises(InputError, match="at least 2 rows.*smaller"):
        gaussian(torch.zeros(1, 3))
