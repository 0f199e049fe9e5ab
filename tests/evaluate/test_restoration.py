"""The four damages are what they claim, and the measures have the scale they claim."""

import math

import pytest
import torch
from torch import Tensor

from naign.data.damage import KINDS, Kind, blackened_rows, degrade, gaussian_kernel
from naign.evaluate import density
from naign.evaluate.restoration import mae, psnr, repair, scores, ssim


def _images(count: int = 64, side: int = 28, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3), (8, 1), (4, 1)])
def test_shape_range_and_determinism(kind: Kind, side: int, channels: int) -> None:
    images = _images(5, side, channels)
    before = images.clone()
    damaged = degrade(images, kind, seed=3)
    assert damaged.shape == images.shape and damaged.dtype == torch.float32
    assert damaged.abs().max() <= 1 and torch.equal(images, before)
    assert torch.equal(damaged, degrade(images, kind, seed=3))
    assert kind == "blur" or not torch.equal(damaged, degrade(images, kind, seed=4))


def test_kernel_sums_to_one_with_the_stated_deviation() -> None:
    kernel = gaussian_kernel().double()
    offsets = torch.arange(9).double() - 4
    assert float(kernel.sum()) == pytest.approx(1)
    # exp(-x^2 / 8) cut off at 4 pixels, two deviations, has this variance; uncut it would be 4
    weights = torch.exp(-offsets.square() / 8)
    expected = float((weights * offsets.square()).sum() / weights.sum())
    assert float((kernel.sum(0) * offsets.square()).sum()) == pytest.approx(expected, rel=1e-5)


def test_blur_spreads_a_dot_into_the_kernel_and_leaves_flat_images() -> None:
    dot = torch.full((1, 1, 28, 28), -1.0)
    dot[0, 0, 14, 14] = 1.0
    spread = (degrade(dot, "blur")[0, 0, 10:19, 10:19] + 1) / 2
    torch.testing.assert_close(spread, gaussian_kernel(), rtol=1e-3, atol=1e-6)
    flat = torch.full((1, 3, 28, 28), 0.25)
    torch.testing.assert_close(degrade(flat, "blur"), flat)


def test_noise_has_deviation_a_half() -> None:
    grey = torch.zeros(200, 1, 28, 28)
    damaged = degrade(grey, "noise")
    clamped = (damaged.abs() == 1).double().mean()  # |N(0, 1)| > 2
    assert float(clamped) == pytest.approx(math.erfc(2 / math.sqrt(2)), abs=0.002)
    within = damaged[damaged.abs() < 0.5].numel() / damaged.numel()  # |N(0, 1)| < 1
    assert within == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.004)


def test_salt_and_pepper_hits_a_fifth_in_equal_parts_all_channels_together() -> None:
    images = torch.zeros(200, 3, 28, 28)
    damaged = degrade(images, "salt_pepper")
    assert set(damaged.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert float((damaged == 1).double().mean()) == pytest.approx(0.1, abs=0.003)
    assert float((damaged == -1).double().mean()) == pytest.approx(0.1, abs=0.003)
    assert torch.equal(damaged[:, 0], damaged[:, 1]) and torch.equal(damaged[:, 0], damaged[:, 2])


@pytest.mark.parametrize(("side", "count"), [(28, 5), (32, 5), (256, 5), (16, 3), (8, 1), (4, 1)])
def test_rows_are_blackened_whole_in_the_stated_number(side: int, count: int) -> None:
    damaged = degrade(torch.ones(40, 2, side, side), "rows")
    black = (damaged == -1).all(dim=3).all(dim=1)
    assert torch.equal(black, (damaged == -1).any(dim=3).any(dim=1))
    assert blackened_rows(side) == count and (black.sum(1) == count).all()
    assert black.any(0).sum() > 1  # not the same rows in every image


def test_measures_have_the_scale_of_two() -> None:
    black, white = torch.full((3, 1, 28, 28), -1.0), torch.full((3, 1, 28, 28), 1.0)
    assert mae(black, white) == 2
    assert psnr(black, white) == pytest.approx(0)  # an error as large as the range is 0 dB
    assert psnr(black, black + 0.2) == pytest.approx(20, abs=1e-4)
    assert psnr(black, black) is None
    images = _images(8)
    assert ssim(images, images) == pytest.approx(1)
    # flat images: only the luminance term is left, (2 a b + C1) / (a^2 + b^2 + C1) with C1 = (0.01 * 2)^2
    half, quarter = torch.full_like(black, 0.5), torch.full_like(black, 0.25)
    assert ssim(half, quarter) == pytest.approx((0.25 + 4e-4) / (0.3125 + 4e-4), abs=1e-4)


@pytest.mark.parametrize("side", [8, 12, 16, 28])
def test_ssim_is_a_number_at_every_size(side: int) -> None:
    images = _images(4, side)
    assert ssim(images, images) == pytest.approx(1)
    assert ssim(degrade(images, "noise"), images) < 0.95


def test_every_answer_is_given_and_scored() -> None:
    clean = _images(6)
    answers = repair(
        clean,
        "rows",
        lambda batch: batch * 0.5,
        typical=torch.zeros(1, 28, 28),
        reference=torch.cat([clean + 0.01, -clean]),
        seed=0,
    )
    found = scores(answers, clean)
    assert set(found) == {"input", "once", "twice", "black", "median", "nearest", "psnr", "ssim"}
    assert torch.equal(answers["twice"], answers["input"] * 0.25)
    assert found["nearest"] == pytest.approx(0.01, abs=1e-5)
    assert found["black"] == pytest.approx(float((clean + 1).mean()), rel=1e-5)
    assert found["median"] == pytest.approx(float(clean.abs().mean()), rel=1e-5)


def test_auroc_orders_and_ties() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    assert density.auroc(low, high) == 1 and density.auroc(high, low) == 0
    assert density.auroc(low, low) == 0.5
    assert density.auroc(low, torch.tensor([0.5])) == 0.5


def test_separation_of_a_perfect_and_of_a_blind_energy() -> None:
    images = _images(30) * 0.1 - 0.7
    outliers = density.outliers(images)
    assert {len(batch) for batch in outliers.values()} == {1, 30}
    assert torch.equal(outliers["upside down"].flip(2), images) and torch.equal(outliers["inverted"], -images)

    def halfway(batch: Tensor) -> Tensor:
        return (batch - 0.7) / 2

    found = density.separation(images, halfway, typical_brightness=-0.7)
    assert found["energy"]["black"] == found["energy"]["uniform noise"] == found["brightness"]["grey"] == 1
    assert found["energy"]["upside down"] == pytest.approx(0.5, abs=0.01)  # ties, but for rounding
    assert found["twice"] == pytest.approx(found["energy"], abs=0.01)  # the same order, only further
    found = density.separation(images, lambda batch: batch, typical_brightness=-0.7)
    assert set(found["energy"].values()) == set(found["twice"].values()) == {0.5}
