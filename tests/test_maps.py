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
    for kind in ("patch of another image", "blurred square", "dead rows"):
        _, changed = made[kind]
        assert not changed.any()
    _, changed = made["patch of another set"]
    assert (changed.sum((1, 2)) == maps.PATCH**2).all()
    images, changed = made["scratch"]
    lighter = images[:, 0] + 1
    assert torch.equal(changed, lighter > maps.CHANGED)
    seen = changed.sum((1, 2))
    seen = seen[seen > 0]  # a scratch of nearly black is not
    assert len(seen) > 50
    assert seen.min() > 12
    assert seen.max() < 3 * 28


def test_a_blurred_square_lies_within_the_image(maps):
    images = random_images(60, 3, 32)
    blurred = maps.blurred(images, torch.Generator().manual_seed(0))
    changed = (blurred != images).any(1)
    rows = changed.any(2).sum(1)
    columns = changed.any(1).sum(1)
    assert (rows == maps.PATCH).all()
    assert (columns == maps.PATCH).all()
    assert (changed.sum((1, 2)) == maps.PATCH**2).all()


def test_a_map_of_what_changed_is_perfect_and_a_flat_one_chance(maps):
    images = random_images(20, 1, 28)
    made = maps.defects(images, images.flip(0), -images, seed=0)

    def difference(x):
        return (x - images).abs().amax(1)

    def zero(x):
        return torch.zeros(20, 28, 28)

    perfect = maps.measured(difference, made)
    flat = maps.measured(zero, made)
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
