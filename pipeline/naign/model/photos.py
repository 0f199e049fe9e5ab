"""Pictures of any size and mode through a model of images: repaired, filled, and the map of what f changes.

The model sees transparent pixels on white, as in training.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from naign.data.decode import decode_picture, in_mode, to_picture, to_pixels
from naign.data.scale import eight_bits, scaled
from naign.errors import InputError, require
from naign.model.naign import NAIGN


def read_picture(path: Path) -> Image.Image:
    """A picture, decoded and upright; 16-bit grey as 8-bit. Raises InputError, with the path, where there is none."""
    data = path.read_bytes()
    try:
        picture = decode_picture(data)
        if picture.mode.startswith("I"):
            return in_mode(picture, "L")
        return picture
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_hole(mask: Path, size: tuple[int, int]) -> Image.Image:
    """Where a mask is white, in mode L of 0 and 255; InputError if that is not a part of a picture of `size`."""
    hole = in_mode(read_picture(mask), "L").point([0] * 128 + [255] * 128)
    least, most = hole.getextrema()
    other = f"--mask {mask} has {hole.width} x {hole.height} pixels, its picture {size[0]} x {size[1]}"
    require(
        (hole.size == size, f"{other}: make them equal"),
        (most, f"--mask {mask} has no hole: paint what is to be filled white"),
        (not least, f"--mask {mask} is a hole altogether: paint what is to be kept black"),
    )
    return hole


def seen(picture: Image.Image, model: NAIGN) -> Image.Image:
    """The picture as the model sees it, in mode L or RGB."""
    return in_mode(picture, "L" if model.shape[0] == 1 else "RGB")


def to_values(picture: Image.Image, model: NAIGN) -> Tensor:
    """(1, C, H, W) float32 in [-1, 1], with the model's C."""
    return scaled(torch.from_numpy(to_pixels(seen(picture, model)).copy())[None])


def shown(values: Tensor) -> Image.Image:
    """Values (1, C, H, W) as a picture."""
    return to_picture(eight_bits(values[0]).numpy())


def colour_profile(picture: Image.Image, model: NAIGN) -> bytes | None:
    """The colour profile, where it fits what the model makes of the picture."""
    profile: bytes = picture.info.get("icc_profile") or b""
    fits = profile[16:20] == (b"GRAY" if model.shape[0] == 1 else b"RGB ")
    return profile if fits else None


def mapped(values: Tensor, made: Tensor) -> Image.Image:
    """The map of |made - values|, its mean over channels, in grey: black is 0, white 1 or more."""
    moved = (made - values).abs().mean(1, keepdim=True)
    return shown(2 * moved - 1)


def filled(
    picture: Image.Image,
    hole: Image.Image,  # mode L, 255 in it
    model: NAIGN,
    *,
    times: int | None,
) -> Image.Image:
    """The picture with its hole filled from what a tile sees around it; all else stays."""
    _, height, width = model.shape
    left, top, right, bottom = hole.getbbox() or (0, 0, *hole.size)
    box = (
        max(0, left - width),
        max(0, top - height),
        min(hole.width, right + width),
        min(hole.height, bottom + height),
    )
    hole = hole.crop(box)
    made = model.project(
        to_values(picture.crop(box), model),
        times=times,
        mask=torch.from_numpy(np.array(hole) > 0),
    )
    whole = seen(picture, model).copy()
    whole.paste(shown(made), box[:2], hole)
    return whole
