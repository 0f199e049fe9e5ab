"""The four damages are what they claim, and the measures have the scale they claim."""

import math

import pytest
import torch

from naign.data.damage import KINDS, degrade, gaussian_kernel
from naign.evaluate.restoration import mae, psnr, repair, scores, ssim


def random_images(count, side=28, channels=1):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, side, side)
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side, channels", [(28, 3), (4, 1)])
def test_damage_has_the_shape_and_range_of_images_and_follows_seed_and_strength(kind, side, channels):
    images = random_images(5, side, channels)
    assert torch.equal(degrade(images, kind, seed=3, strength=0.0), images)
    before = images.clone()
    damaged = degrade(images, kind, seed=3)
    assert torch.equal(images, before)
    assert damaged.shape == images.shape
    assert damaged.abs().max() <= 1
    assert torch.equal(damaged, degrade(images, kind, seed=3))
    if kind != "blur":
        assert not torch.equal(damaged, degrade(images, kind, seed=4))
    if side == 28:
        weaker = degrade(images, kind, seed=3, strength=0.5)
        stronger = degrade(images, kind, seed=3, strength=2.0)
        assert 0 < mae(weaker, images) < mae(damaged, images) < mae(stronger, images)


def test_blur_spreads_a_dot_into_the_kernel_and_leaves_flat_images():
    kernel = gaussian_kernel()
    offsets = torch.arange(9) - 4
    weights = torch.exp(-offsets.square() / 8)  # sigma 2, cut off at two deviations
    torch.testing.assert_close(kernel.sum(0), weights / weights.sum())
    dot = torch.full((1, 1, 28, 28), -1.0)
    dot[0, 0, 14, 14] = 1.0
    spread = (degrade(dot, "blur")[0, 0, 10:19, 10:19] + 1) / 2
    torch.testing.assert_close(spread, kernel, rtol=1e-3, atol=1e-6)
    flat = torch.full((1, 3, 28, 28), 0.25)
    torch.testing.assert_close(degrade(flat, "blur"), flat)


def test_noise_has_deviation_a_half():
    damaged = degrade(torch.zeros(200, 1, 28, 28), "noise").abs()
    clamped = float((damaged == 1).double().mean())  # |N(0, 1)| > 2
    within = float((damaged < 0.5).double().mean())  # |N(0, 1)| < 1
    assert clamped == pytest.approx(math.erfc(2 / math.sqrt(2)), abs=0.002)
    assert within == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.004)


def test_salt_and_pepper_hits_a_fifth_in_equal_parts_all_channels_together():
    damaged = degrade(torch.zeros(200, 3, 28, 28), "salt_pepper")
    assert set(damaged.unique().tolist()) == {-1.0, 0.0, 1.0}
    for value in (1, -1):
        assert float((damaged == value).double().mean()) == pytest.approx(0.1, abs=0.003)
    assert torch.equal(damaged[:, :1].expand_as(damaged), damaged)


@pytest.mark.parametrize(
    "side, count",
    [
        (28, 5),
        (16, 3),
        (4, 1),
    ],
)
def test_rows_are_blackened_whole_in_the_stated_number(side, count):
    damaged = degrade(torch.ones(40, 2, side, side), "rows")
    black = damaged == -1
    rows = black.all(dim=3).all(dim=1)
    assert torch.equal(rows, black.any(dim=3).any(dim=1))
    assert (rows.sum(1) == count).all()
    assert rows.any(0).sum() > 1  # not the same rows in every image


def test_measures_have_the_scale_of_two():
    black = torch.full((3, 1, 28, 28), -1.0)
    assert mae(black, -black) == 2
    assert psnr(black, -black) == pytest.approx(0)  # an error as large as the range is 0 dB
    assert psnr(black, black + 0.2) == pytest.approx(20, abs=1e-4)
    assert psnr(black, black) is None
    # flat images: only the luminance term is left, (2 a b + C1) / (a^2 + b^2 + C1) with C1 = (0.01 * 2)^2
    half = torch.full_like(black, 0.5)
    expected = (0.25 + 4e-4) / (0.3125 + 4e-4)
    assert ssim(half, half / 2) == pytest.approx(expected, abs=1e-4)


def test_ssim_is_a_number_of_small_images():
    images = random_images(4, 8)
    assert ssim(images, images) == pytest.approx(1)
    assert ssim(degrade(images, "noise"), images) < 0.95


def test_every_answer_is_given_and_scored():
    clean = random_images(6)
    reference = torch.cat([clean + 0.01, -clean])
    answers = repair(clean, "rows", lambda batch: batch * 0.5, reference=reference)
    found = scores(answers, clean)
    assert set(found) == {*answers, "psnr", "ssim"}
    assert torch.equal(answers["twice"], answers["input"] * 0.25)
    assert found["nearest"] == pytest.approx(0.01, abs=1e-5)
