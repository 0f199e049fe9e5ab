"""The holes and fillers of benchmarks/holes.py on cases with known answers."""

from types import SimpleNamespace

import pytest
import torch

from naign.errors import InputError

SIZE = torch.Size((28, 28))


@pytest.fixture(scope="module")
def holes(benchmarks):
    import holes

    return holes


def test_every_kind_of_hole_leaves_something_known(holes):
    for kind in holes.KINDS:
        mask = holes.draw_holes(kind, SIZE)
        shares = mask.float().mean((1, 2, 3))
        assert torch.equal(mask, holes.draw_holes(kind, SIZE))
        assert shares.min() > 0
        assert shares.max() < 1
    assert shares.mean() < 0.25  # strokes
    assert holes.draw_holes("centre", SIZE)[0, 0, 7:21, 7:21].all()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("biharmonic (scikit-image)", "skimage"),
        ("Telea (OpenCV)", "cv2"),
        ("mean of what is known", "torch"),
    ],
)
def test_a_filler_guesses_what_is_constant_from_what_is_known(holes, name, module):
    pytest.importorskip(module)
    shades = torch.tensor([-0.6, 0.2, 1.0])
    images = shades.view(1, 3, 1, 1).expand(7, 3, 16, 16)
    mask = holes.draw_holes("boxes", torch.Size((16, 16)))[:3]
    hole = holes.in_turn(mask, 7)
    filled = holes.FILLERS[name](images.masked_fill(hole, -1.0), mask)
    torch.testing.assert_close(torch.where(hole, filled, images), images, atol=0.05, rtol=0)


def test_what_is_measured_is_the_hole(holes):
    """Every pixel of a hole is off by a quarter; what a filler says of the rest is not looked at."""
    examples = object.__new__(holes.Examples)
    examples.images = torch.rand(200, 1, 16, 16)
    examples.floor = 2.0
    examples.encoder = SimpleNamespace(features=lambda images: images.mean((2, 3)))
    examples.features = examples.images.mean((2, 3))

    def fill(images, mask):
        return torch.where(holes.in_turn(mask, 200), examples.images + 0.25, 9.0)

    row = examples.measure(fill)
    for kind in holes.KINDS:
        assert row[f"error {kind}"] == pytest.approx(0.25, abs=1e-6)
    assert row["FD centre"] == pytest.approx((0.25 / 4) ** 2 / 2, rel=1e-3)


def test_what_cannot_be_measured_is_refused(holes):
    with pytest.raises(InputError, match="give 100 to 10,000"):
        holes.main(holes.Settings(count=99))
