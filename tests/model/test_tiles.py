"""Images of any size through a network of one: exact where nothing is changed, without seams."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from naign.data.scale import scaled
from naign.model import tiles
from tests.data.test_resize import PHOTOS
from tests.model.made import assert_near, wrapped
from tests.refused import refused

SIDE = 24


class Principal(nn.Module):
    """The projection of tiles onto the principal components of a photograph's: idempotent, as a trained f is."""

    def __init__(self, windows, components):
        super().__init__()
        flat = windows.flatten(1)
        self.mean = nn.Parameter(flat.mean(0))
        _, _, directions = torch.linalg.svd(flat - self.mean, full_matrices=False)
        self.basis = nn.Parameter(directions[:components])

    def forward(self, x):
        codes = (x.flatten(1) - self.mean) @ self.basis.T
        return (self.mean + codes @ self.basis).view_as(x)


@pytest.fixture(scope="module")
def photos():
    """Two photographs (2, 1, H, W)."""
    pictures = [np.array(Image.open(path).convert("L")) for path in PHOTOS]
    return scaled(torch.from_numpy(np.stack(pictures))[:, None])


@pytest.fixture(scope="module")
def model(photos):
    windows = photos[:, 0].unfold(1, SIDE, 5).unfold(2, SIDE, 5)
    network = Principal(windows.reshape(-1, 1, SIDE, SIDE), 200)
    return wrapped(network, (1, SIDE, SIDE))


def at_borders(photos, model, dim):
    """What is measured where tiles begin, over what is measured elsewhere, along `dim`: the mean squared gradient
    across these lines, as a multiple of the photograph's, and the mean energy. Of several positions of the tiles on it.
    """
    step = min(SIDE, round(tiles.STEP * SIDE) | 1)
    sums = torch.zeros(3, 2, dtype=torch.float64)  # of f(x)'s gradient, x's, and the residual; where tiles begin or not
    for shift in range(0, step, 2):
        x = photos.narrow(dim, shift, photos.shape[dim] - SIDE)
        y = model.project(x)
        starts, _ = tiles._windows(x.shape[dim], SIDE)
        lines = torch.arange(1, x.shape[dim])
        begins = torch.isin(lines, torch.tensor(starts)).long()
        residual = (y - x).narrow(dim, 1, x.shape[dim] - 1)
        changes = (y.diff(dim=dim), x.diff(dim=dim), residual)
        for row, change in zip(sums, changes, strict=True):
            squares = change.square().transpose(dim, 3)
            row.index_add_(0, begins, squares.mean((0, 1, 2)).double())
    gradient = sums[0] / sums[1]
    counts = [len(begins) - len(starts) + 1, len(starts) - 1]
    energy = sums[2] / torch.tensor(counts)
    return float(gradient[1] / gradient[0]), float(energy[1] / energy[0])


@pytest.mark.parametrize("dim", [2, 3])
def test_no_seam_is_seen(photos, model, dim, monkeypatch):
    assert at_borders(photos, model, dim) == pytest.approx((1, 1), abs=0.05)
    monkeypatch.setattr(tiles, "STEP", 1.0)
    assert at_borders(photos, model, dim)[0] > 1.2


@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (SIDE, SIDE),
        (3, 100),
        (25, 47),
    ],
)
def test_windows_sum_to_one_at_any_size(size):
    x = torch.rand(2, 3, *size) * 2 - 1
    assert_near(tiles.blended(lambda x: x, x, (SIDE, SIDE)), x, 1e-6)


def test_the_model_s_own_size_is_one_evaluation(photos, model):
    x = photos[..., :SIDE, :SIDE]
    assert torch.equal(model.project(x), model.network(x))


def test_a_smaller_image_is_reflected(photos, model):
    x = photos[..., : SIDE - 4, : SIDE - 8]
    padded = nn.functional.pad(x, (4, 4, 2, 2), mode="reflect")
    assert_close(model.project(x), model.network(padded)[..., 2:-2, 4:-4])


def test_progress_counts_tiles_and_the_mean_of_the_map_is_the_energy(model):
    counted = []
    x = torch.rand(2, 1, 50, 30)
    model.project(x, advance=counted.append)
    tops, _ = tiles._windows(50, SIDE)
    lefts, _ = tiles._windows(30, SIDE)
    assert sum(counted) == 2 * len(tops) * len(lefts)
    found = model.energy(x, map=True)
    assert found.shape == (2, 50, 30)
    assert_close(found.mean((1, 2)), model.energy(x))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 30, 30),
        (1, 1, 0, 5),
    ],
)
def test_what_is_no_image_of_the_model_s_channels_is_refused(model, shape):
    with refused(r"takes \(1, 24, 24\), images also of another height and width, not"):
        model.project(torch.zeros(shape))
