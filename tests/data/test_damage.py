"""Damage to learn from: of each row's own numbers alone, of every kind, within the images' range."""

from importlib.metadata import EntryPoint

import pytest
import torch

from naign import philox
from naign.data.damage import DAMAGES, HOLES, Damage, find_damage
from naign.settings.registry import known
from tests.refused import refused

SHAPE = (1, 28, 28)


def drawn(name, count, shape=SHAPE):
    """The normals and uniform numbers of so many images."""
    numbers = torch.arange(count)
    normals = philox.normal(
        0,
        3,
        numbers,
        shape,
        stream=philox.NOISE,
    )
    uniform = philox.uniform(
        0,
        3,
        numbers,
        (find_damage(name).uniforms(shape),),
        stream=philox.DAMAGE,
    )
    return normals, uniform


def damaged(
    name,
    images,
    normals,
    uniform,
    strength=0.5,
):
    return find_damage(name).damage(
        images,
        normals,
        uniform,
        strength,
    )


def bars(count, shape=SHAPE):
    """Black images with a white bar somewhere."""
    images = torch.full((count, *shape), -1.0)
    for row in range(count):
        images[row, :, 6:22, 4 + row % 20] = 1.0
    return images


def share(where):
    return float(where.float().mean())


@pytest.mark.parametrize("name", DAMAGES)
def test_a_row_depends_on_its_own_numbers_alone(name):
    images = bars(64)
    normals, uniform = drawn(name, 64)
    chosen = torch.tensor([40, 3, 17])
    whole = damaged(name, images, normals, uniform)
    part = damaged(
        name,
        images[chosen],
        normals[chosen],
        uniform[chosen],
    )
    assert torch.equal(part, whole[chosen])


def test_noise_has_every_strength_up_to_the_largest():
    images = torch.zeros(4000, *SHAPE)
    out = damaged("noise", images, *drawn("noise", 4000))
    spread = out.flatten(1).std(1)
    assert 0 < spread.min() < 0.02
    assert 0.48 < spread.max() < 0.56
    assert float(spread.mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)])
@pytest.mark.parametrize(
    "name, whole",
    [
        ("mixed", (1 / 2) ** 4),
        ("mild", (2 / 3) ** 4),
        ("holes", (2 / 3) ** 4 / 2),
    ],
)
def test_some_images_stay_whole_and_all_in_range(name, whole, shape):
    images = torch.rand(2000, *shape) * 2 - 1
    out = damaged(name, images, *drawn(name, 2000, shape))
    assert out.shape == images.shape
    assert out.min() >= -1
    assert out.max() <= 1
    unchanged = (out == images).flatten(1).all(1)
    assert share(unchanged) == pytest.approx(15 / 16 * whole, abs=0.03)  # one in sixteen is erased


def test_mixed_has_specks_and_stripes():
    """Of images of one shade nothing else can be seen where there is no noise."""
    normals, uniform = drawn("mixed", 2000)
    uniform[:, 14] = 1.0  # nothing erased
    changed = (
        damaged(
            "mixed",
            torch.full((2000, *SHAPE), 0.25),
            normals,
            uniform,
            strength=0.0,
        )
        != 0.25
    )
    rows = changed.all(3).any((1, 2))
    columns = changed.all(2).any((1, 2))
    touched = changed.flatten(1).any(1)
    assert 0.3 < share(touched) < 0.8
    assert 0.2 < share(rows & ~columns) < 0.6
    assert 0.02 < share(columns & ~rows) < 0.3
    assert 0.15 < share(touched & ~rows & ~columns) < 0.4


def test_mixed_loses_detail():
    """A bar is paler and wider, and as bright in all."""
    images = bars(2000)
    normals, uniform = drawn("mixed", 2000)
    uniform[:, 9:12] = 1.0  # neither noise nor specks nor stripes
    uniform[:, 14] = 1.0
    blurred = damaged("mixed", images, normals, uniform)
    touched = (blurred != images).flatten(1).any(1)
    assert 0.4 < share(touched) < 0.6
    brightness = blurred.mean((1, 2, 3))
    brightest = blurred[touched].amax((1, 2, 3))
    assert torch.allclose(brightness, images.mean((1, 2, 3)), atol=0.02)
    assert brightest.mean() < 0.7


def test_mixed_erases_one_image_in_sixteen():
    normals, uniform = drawn("mixed", 4000)
    uniform[:, 8:12] = 1.0  # nothing else
    out = damaged(
        "mixed",
        bars(4000),
        normals,
        uniform,
    ).flatten(1)
    flat = (out == out[:, :1]).all(1)
    assert share(flat) == pytest.approx(1 / 16, abs=0.015)
    shades = out[flat, 0]
    assert share(shades == -1) == pytest.approx(0.5, abs=0.1)
    assert shades.max() > 0.8
    kept = damaged(
        "photo",
        bars(4000),
        normals,
        uniform,
    )
    assert torch.equal(kept, bars(4000))


def test_holes_are_boxes_and_strokes_and_otherwise_mild():
    images = bars(2000)
    normals, uniform = drawn("holes", 2000)
    holed = damaged("holes", images, normals, uniform)
    changed = (
        holed
        != damaged(
            "mild",
            images,
            normals,
            uniform[:, :-HOLES],
        )
    ).flatten(1)
    touched = changed.any(1)
    assert share(touched) == pytest.approx(1 / 2, abs=0.04)
    sizes = changed[touched].float().mean(1)
    assert sizes.quantile(0.1) < 0.1
    assert sizes.max() < 0.8
    assert float(sizes.mean()) == pytest.approx(0.2, abs=0.07)


def test_points_take_noise_only():
    find_damage("noise").check((2,))
    for name in ("mixed", "mild", "photo", "holes"):
        with refused("at least 8x8"):
            find_damage(name).check((2,))


INVERTED = Damage(
    damage=lambda images, normals, uniform, strength: -images,
    uniforms=lambda shape: 2,
    check=lambda shape: None,
)


def test_a_damage_of_another_package(monkeypatch):
    points = {"naign.damage": {"inverted": EntryPoint("inverted", "tests.data.test_damage:INVERTED", "")}}
    monkeypatch.setattr("naign.settings.registry._entry_points", lambda group: points.get(group, {}))
    assert known(DAMAGES, "naign.damage") == [*DAMAGES, "inverted"]
    assert find_damage("inverted").uniforms(SHAPE) == 2
    out = damaged("inverted", bars(3), *drawn("inverted", 3))
    assert torch.equal(out, -bars(3))
    with refused("'noice': choose one of .*inverted, or install .*; did you mean noise"):
        find_damage("noice")
