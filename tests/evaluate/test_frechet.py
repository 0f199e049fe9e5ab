"""Frechet distance against closed forms and against scipy's general matrix root."""

import numpy as np
import pytest
import scipy.linalg
import torch

from naign.evaluate.frechet import frechet_distance, gaussian, gaussian_distance
from tests.match.problems import draw
from tests.refused import refused


def distance(mean1, covariance1, mean2, covariance2):
    parts = (mean1, covariance1, mean2, covariance2)
    return gaussian_distance(*(torch.as_tensor(part, dtype=torch.float64) for part in parts))


def test_agrees_with_scipy_sqrtm():
    size = 64
    random = np.random.default_rng(size)
    roots = random.normal(size=(2, size, size + 3))
    covariance1, covariance2 = roots @ roots.transpose(0, 2, 1) / size
    mean1, mean2 = random.normal(size=(2, size))
    root = scipy.linalg.sqrtm(covariance1 @ covariance2).real
    traces = np.trace(covariance1 + covariance2 - 2 * root)
    expected = np.square(mean1 - mean2).sum() + traces
    assert distance(mean1, covariance1, mean2, covariance2) == pytest.approx(expected, rel=1e-8)
    assert distance(mean2, covariance2, mean1, covariance1) == pytest.approx(expected, rel=1e-8)


def test_rank_deficient_features_do_not_turn_negative_or_nan():
    features = draw(0, 5, 64)  # rank 4 in 64 dimensions
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 1) == pytest.approx(64, rel=1e-5)


def test_gaussian_is_numpys_mean_and_covariance():
    features = draw(1, 50, 4)
    mean, covariance = gaussian(features)
    exact = features.double().numpy()
    np.testing.assert_allclose(mean, exact.mean(0))
    np.testing.assert_allclose(covariance, np.cov(exact.T))


def test_one_row_has_no_covariance():
    with refused("at least 2 rows.*smaller"):
        gaussian(torch.zeros(1, 3))
