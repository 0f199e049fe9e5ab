"""The defects and scores of benchmarks/maps.py on cases with known answers."""

import pytest
import torch


@pytest.fixture(scope="module")
def maps(benchmarks):
    import maps

    return maps


def random_images(count, channels, side):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


def test_what_does_not_change_is_not_a_defect(maps):
    black = torch.full((60, 1, 28, 28), -1.0)
    made = maps.defects(black, black, black + 2, seed=0)
    pixels = {kind: changed.sum((1, 2)) for kind, (_, changed) in made.items()}
    for kind in ("patch of another image", "blurred square", "dead rows"):
        assert not pixels[kind].any()
    assert (pixels["patch of another set"] == maps.PATCH**2).all()
    images, changed = made["scratch"]
    assert torch.equal(changed, (images[:, 0] + 1) > maps.CHANGED)
    seen = pixels["scratch"][pixels["scratch"] > 0]  # a scratch of nearly black is not
    assert len(seen) > 50
    assert seen.min() > 12
    assert seen.max() < 3 * 28


def test_a_blurred_square_lies_within_the_image(maps):
    images = random_images(60, 3, 32)
    blurred = maps.blurred(images, torch.Generator().manual_seed(0))
    changed = (blurred != images).any(1)
    assert (changed.any(2).sum(1) == maps.PATCH).all()
    assert (changed.any(1).sum(1) == maps.PATCH).all()
    assert (changed.sum((1, 2)) == maps.PATCH**2).all()


def test_a_map_of_what_changed_is_perfect_and_a_flat_one_chance(maps):
    images = random_images(20, 1, 28)
    made = maps.defects(images, images.flip(0), -images, seed=0)
    perfect = maps.measured(lambda x: (x - images).abs().amax(1), made)
    flat = maps.measured(lambda x: torch.zeros(20, 28, 28), made)
    for kind in made:
        assert perfect[kind][0] == 1
        assert flat[kind] == [0.5, 0.5]


def test_the_map_of_the_nearest_image_is_the_difference_from_it(maps):
    train = random_images(30, 3, 8)
    score = maps.image_map(train)
    changed = train[:5].clone()
    changed[:, :, 2, 3] += 0.1
    expected = torch.zeros(5, 8, 8)
    expected[:, 2, 3] = 0.01
    torch.testing.assert_close(score(changed), expected, atol=1e-6, rtol=1e-4)
