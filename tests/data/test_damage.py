"""Damage to learn from: of each row's own numbers alone, of every kind, within the images' range."""

from importlib.metadata import EntryPoint

import pytest
import torch

from naign import philox
from naign.data.damage import DAMAGES, HOLES, Damage, find_damage, known_mean
from naign.errors import InputError
from naign.settings.registry import known

SHAPE = (1, 28, 28)


def drawn(name, numbers, shape=SHAPE):
    normals = philox.normal(0, 3, numbers, shape, stream=philox.NOISE)
    return normals, philox.uniform(0, 3, numbers, (find_damage(name).uniforms(shape),), stream=philox.DAMAGE)


def bars(count, shape=SHAPE):
    """Black images with a white bar somewhere."""
    images = torch.full((count, *shape), -1.0)
    for row in range(count):
        images[row, :, 6:22, 4 + row % 20] = 1.0
    return images


@pytest.mark.parametrize("name", DAMAGES)
def test_a_row_depends_on_its_own_numbers_alone(name):
    numbers, images = torch.arange(64), bars(64)
    whole = find_damage(name).damage(images, *drawn(name, numbers), 0.5)
    chosen = torch.tensor([40, 3, 17])
    assert torch.equal(find_damage(name).damage(images[chosen], *drawn(name, numbers[chosen]), 0.5), whole[chosen])


def test_noise_has_every_strength_up_to_the_largest():
    images = torch.zeros(4000, *SHAPE)
    damaged = find_damage("noise").damage(images, *drawn("noise", torch.arange(4000)), 0.5).flatten(1).std(1)
    assert 0 < float(damaged.min()) < 0.02 and 0.48 < float(damaged.max()) < 0.56
    assert float(damaged.mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32), (1, 8, 8)])
@pytest.mark.parametrize(
    ("name", "whole"), [("mixed", (1 / 2) ** 4), ("mild", (2 / 3) ** 4), ("holes", (2 / 3) ** 4 / 2)]
)
def test_some_images_stay_whole_and_all_in_range(name, whole, shape):
    numbers = torch.arange(2000)
    images = bars(2000, shape) if shape == SHAPE else torch.rand(2000, *shape) * 2 - 1
    damaged = find_damage(name).damage(images, *drawn(name, numbers, shape), 0.5)
    assert damaged.shape == images.shape and float(damaged.min()) >= -1 and float(damaged.max()) <= 1
    found_whole = float((damaged == images).flatten(1).all(1).float().mean())
    assert found_whole == pytest.approx(15 / 16 * whole, abs=0.03)  # one in sixteen is erased


def test_mixed_has_each_kind():
    """Of images of one shade nothing but specks and stripes can be seen where there is no noise."""
    numbers = torch.arange(2000)
    flat = torch.full((2000, *SHAPE), 0.25)
    normals, uniform = drawn("mixed", numbers)
    uniform[:, 14] = 1.0  # nothing erased
    changed = find_damage("mixed").damage(flat, normals, uniform, 0.0) != 0.25
    rows, columns = changed.all(3).any((1, 2)), changed.all(2).any((1, 2))
    assert 0.3 < float(changed.flatten(1).any(1).float().mean()) < 0.8
    assert 0.2 < float((rows & ~columns).float().mean()) < 0.6 and 0.02 < float((columns & ~rows).float().mean()) < 0.3
    specks = changed.flatten(1).any(1) & ~rows & ~columns
    assert 0.15 < float(specks.float().mean()) < 0.4
    # Lost detail: a bar is paler and wider, and as bright in all.
    images = bars(2000)
    uniform[:, 9:12] = 1.0  # neither noise nor specks nor stripes
    blurred = find_damage("mixed").damage(images, normals, uniform, 0.5)
    touched = (blurred != images).flatten(1).any(1)
    assert 0.4 < float(touched.float().mean()) < 0.6
    assert torch.allclose(blurred.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=0.02)
    assert float(blurred[touched].amax((1, 2, 3)).mean()) < 0.7


def test_mixed_erases_one_image_in_sixteen():
    numbers, images = torch.arange(4000), bars(4000)
    normals, uniform = drawn("mixed", numbers)
    uniform[:, 8:12] = 1.0  # nothing else
    damaged = find_damage("mixed").damage(images, normals, uniform, 0.5).flatten(1)
    flat = (damaged == damaged[:, :1]).all(1)
    assert float(flat.float().mean()) == pytest.approx(1 / 16, abs=0.015)
    shades = damaged[flat, 0]
    assert 0.35 < float((shades == -1).float().mean()) < 0.65 and float(shades.max()) > 0.8


def test_photo_is_mild_but_erases_nothing():
    images = bars(2000)
    normals, uniform = drawn("photo", torch.arange(2000))
    mild, photo = (find_damage(name).damage(images, normals, uniform, 0.5) for name in ("mild", "photo"))
    erased = uniform[:, 14] < 1 / 16
    assert torch.equal(photo[~erased], mild[~erased]) and not torch.equal(photo[erased], mild[erased])
    uniform[:, 8:12] = 1.0
    assert torch.equal(find_damage("photo").damage(images, normals, uniform, 0.5), images)


def test_holes_are_boxes_and_strokes_and_otherwise_mild():
    numbers, images = torch.arange(2000), bars(2000)
    normals, uniform = drawn("holes", numbers)
    holed = find_damage("holes").damage(images, normals, uniform, 0.5)
    mild = find_damage("mild").damage(images, normals, uniform[:, :-HOLES], 0.5)
    changed = (holed != mild).flatten(1)
    assert float(changed.any(1).float().mean()) == pytest.approx(1 / 2, abs=0.04)
    shares = changed[changed.any(1)].float().mean(1)
    assert float(shares.quantile(0.1)) < 0.1 and float(shares.mean()) == pytest.approx(0.2, abs=0.07)
    assert float(shares.max()) < 0.8


def test_the_mean_of_what_is_known():
    images, known = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5) < 0.5
    means = known_mean(images, known)
    assert means.shape == (2, 3, 1, 1)
    torch.testing.assert_close(means[1, 2, 0, 0], images[1, 2][known[1, 0]].mean())


def test_points_take_noise_only():
    find_damage("noise").check((2,))
    for name in ("mixed", "mild", "photo", "holes"):
        with pytest.raises(InputError, match="at least 8x8"):
            find_damage(name).check((2,))


INVERTED = Damage(lambda images, normals, uniform, strength: -images, lambda shape: 2, lambda shape: None)


def test_a_damage_of_another_package(monkeypatch):
    points = {"naign.damage": {"inverted": EntryPoint("inverted", "tests.data.test_damage:INVERTED", "")}}
    monkeypatch.setattr("naign.settings.registry._entry_points", lambda group: points.get(group, {}))
    assert known(DAMAGES, "naign.damage") == [*DAMAGES, "inverted"]
    assert find_damage("inverted").uniforms(SHAPE) == 2
    find_damage("inverted").check(SHAPE)
    assert torch.equal(find_damage("inverted").damage(bars(3), *drawn("inverted", torch.arange(3)), 0.5), -bars(3))
    with pytest.raises(
        InputError, match="objective.damage is 'noice': choose one of .*inverted, or install .*; did you mean noise"
    ):
        find_damage("noice").check(SHAPE)
