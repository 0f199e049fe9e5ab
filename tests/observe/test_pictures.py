"""Pictures have the size and the pixels they should."""

import unicodedata

import numpy as np
import pytest
import torch
from PIL import ImageFont

from naign.observe.pictures import CELL, GAP, PANEL, grid, legible, rows, scatter, shades, to_image


def test_an_image_keeps_its_size_and_values() -> None:
    image = torch.tensor([[-1.0, 0.0], [1.0, 3.0]])[None]
    picture = to_image(image)
    assert picture.size == (2, 2) and picture.mode == "RGB"
    assert np.asarray(picture)[..., 0].tolist() == [[0, 128], [255, 255]]
    colour = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 4, 4)
    assert to_image(colour).getpixel((3, 3)) == (255, 0, 128)


def test_a_grid_enlarges_by_a_whole_factor_and_fills_row_by_row() -> None:
    images = torch.full((5, 1, 28, 28), -1.0)
    images[3] = 1.0
    picture = grid(images, columns=3)
    side = 56  # the least multiple of 28 that is no less than CELL
    assert side >= CELL and picture.size == (3 * (side + GAP) - GAP, 2 * (side + GAP) - GAP)
    assert picture.getpixel((1, side + GAP + 1)) == (255, 255, 255, 255)
    assert picture.getpixel((1, 1)) == (0, 0, 0, 255)
    assert picture.getpixel((picture.width - 1, picture.height - 1))[3] == 0  # the sixth cell is empty


def test_labels_take_a_margin() -> None:
    images = torch.zeros(2, 1, 48, 48)
    assert rows([("clean", images), ("damaged", images)]).width > rows([("", images), ("", images)]).width


def test_no_letter_of_a_label_is_drawn_as_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("T-shirt", "Kočka", unicodedata.normalize("NFD", "Kočka"), "Собака", "猫 2")
    for name in names:
        text, font = legible(name)
        assert text.isascii() or all(bytes(font.getmask(letter)) != bytes(font.getmask("\uffff")) for letter in text)
    truetype = ImageFont.truetype

    def without_fonts(font: object, *arguments: float, **options: object) -> ImageFont.FreeTypeFont:
        if isinstance(font, str):
            raise OSError("cannot open resource")
        return truetype(font, *arguments, **options)

    monkeypatch.setattr(ImageFont, "truetype", without_fonts)
    assert [legible(name)[0] for name in names] == ["T-shirt", "Kocka", "Kocka", "??????", "? 2"]


def test_points_are_drawn_where_they_are() -> None:
    square = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    picture = scatter([("left", square), ("right", square * 100)], behind=square)  # far points stay on the edge
    assert picture.size == (2 * PANEL + GAP, PANEL + 22)
    panel = np.asarray(picture)[22:, :PANEL]
    orange = np.argwhere((panel[..., 0] > 200) & (panel[..., 2] < 60))
    assert len(orange) == 8  # two dots of two by two pixels
    assert orange[0, 1] > PANEL // 2 and orange[-1, 1] < PANEL // 2  # (1, 1) is at the upper right


def test_shades_are_white_where_the_value_is_nothing() -> None:
    picture = shades(torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.getpixel((1, 1)) == (12, 30, 90)


def test_points_of_more_than_two_coordinates_are_drawn_by_the_first_two() -> None:
    points = torch.randn(50, 3)
    flat, deep = (scatter([("f(z)", some)], behind=some) for some in (points[:, :2], points))
    assert np.array_equal(np.asarray(flat), np.asarray(deep))
