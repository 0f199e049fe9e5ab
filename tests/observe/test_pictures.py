"""Pictures have the size and the pixels they should."""

import numpy as np
import torch

from naign.observe.pictures import CELL, GAP, grid, legible, to_image


def test_an_image_keeps_its_size_and_values():
    picture = to_image(torch.tensor([[[-1.0, 0.0], [1.0, 3.0]]]))
    assert picture.size == (2, 2)
    assert picture.mode == "RGB"
    red = np.asarray(picture)[..., 0]
    assert red.tolist() == [[0, 128], [255, 255]]
    colour = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 4, 4)
    assert to_image(colour).getpixel((3, 3)) == (255, 0, 128)


def test_a_grid_enlarges_by_a_whole_factor_and_fills_row_by_row():
    images = torch.full((5, 1, 28, 28), -1.0)
    images[3] = 1.0
    picture = grid(images, columns=3)
    side = 56  # the least multiple of 28 that is not less than CELL
    assert side >= CELL
    assert picture.size == (3 * (side + GAP) - GAP, 2 * (side + GAP) - GAP)
    assert picture.getpixel((1, side + GAP + 1)) == (255, 255, 255, 255)
    assert picture.getpixel((1, 1)) == (0, 0, 0, 255)
    assert picture.getpixel((picture.width - 1, picture.height - 1))[3] == 0  # the sixth cell is empty


def test_letters_of_a_label_that_cannot_be_drawn_are_replaced():
    names = ("T-shirt", "Kočka", "Собака", "猫 2")
    assert [legible(name) for name in names] == ["T-shirt", "Kocka", "??????", "? 2"]
