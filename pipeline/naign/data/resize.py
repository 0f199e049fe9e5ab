"""How pictures of any size become images of one size, as in torchvision: a window of the upright picture is resized."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from naign.data.decode import Array, decode_image, decode_jpeg, decoding, jpeg_header, to_picture, to_pixels
from naign.errors import InputError

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright picture
Numbers = npt.NDArray[np.float64]

FITS = ("crop", "random")
SMALLEST = 2  # pixels a side: torch's interpolate fails at 1
LARGEST = 8192  # pixels a side: a colour image is then 805 MB as float32
AREA = (0.08, 1.0)  # of random windows: share of the picture's, as torchvision's
RATIO = (0.75, 1.3333)  # of random windows: width by height, as torchvision's
TRIES = 10  # windows of random area and shape that are tried before the central one is taken, as torchvision does
WINDOW = 2 * TRIES + 2  # uniform numbers that one random window takes
SPARE = 2.5  # a JPEG is decoded at the least scale at which its window is still so many times the size


@dataclass(kw_only=True, slots=True, frozen=True)
class Resize:
    """How a picture of any size becomes an image."""

    height: int = 0  # of the images, in pixels; 0: as stored, which must be one size, or `crop`
    width: int = 0
    fit: str = "crop"  # one of FITS
    crop: int = 0  # without a height: windows of so many pixels a side, not resized; 0: whole images

    def shape(self, stored: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The images' shape; in the `stored` one 0 is a length that varies. InputError, with `name`, where none is."""
        if len(stored) != 3 and (self.height or self.crop):
            raise InputError(f"data.size and data.crop are of pictures, {name} holds points of {stored}")
        if self.height:
            return stored[0], self.height, self.width
        if self.crop and 0 < min(stored[1:]) < self.crop:
            raise InputError(f"data.crop={self.crop} is more than there is of {name} {stored}")
        if self.crop:
            return stored[0], self.crop, self.crop
        if 0 in stored:
            raise InputError(f"the pictures of {name} have many sizes: say one, as with --data.size=64")
        return stored

    def box(self, width: int, height: int, drawn: Numbers | None = None) -> Box:
        """The window of a picture: if `fit` is random, WINDOW numbers in [0, 1) decide, else, or for None, the largest
        central one of the images' shape.
        """
        if self.fit == "random" and drawn is not None:
            return self._random_box(width, height, drawn)
        return self._central_box(width, height, self.width / self.height)

    def _central_box(self, width: int, height: int, ratio: float) -> Box:
        """The largest central window that is `ratio` times as wide as high."""
        wide = min(width, max(1, round(height * ratio)))
        high = min(height, max(1, round(width / ratio)))
        return self._aligned((width - wide) // 2, (height - high) // 2, wide, high)

    def _random_box(self, width: int, height: int, drawn: Numbers) -> Box:
        for area, shape in drawn[: 2 * TRIES].reshape(TRIES, 2).tolist():
            pixels = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
            ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** shape
            wide = round(math.sqrt(pixels * ratio))
            high = round(math.sqrt(pixels / ratio))
            if 0 < wide <= width and 0 < high <= height:
                top = int(drawn[-2] * (height - high + 1))
                left = int(drawn[-1] * (width - wide + 1))
                return self._aligned(left, top, wide, high)
        return self._central_box(width, height, min(max(width / height, RATIO[0]), RATIO[1]))

    def _aligned(self, left: int, top: int, wide: int, high: int) -> Box:
        """A window whose edges are whole pixels also of a JPEG that is decoded small."""
        factor = self.factor((left, top, left + wide, top + high))
        edges = (edge // factor * factor for edge in (left, top, left + wide, top + high))
        return tuple(edges)  # type: ignore[return-value]

    def factor(self, box: Box) -> int:
        """By how much smaller a JPEG is decoded."""
        left, top, right, bottom = box
        room = min((right - left) / self.width, (bottom - top) / self.height) / SPARE
        return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def parse_size(text: str, setting: str) -> tuple[int, int]:
    """Height and width in pixels of `64` or `48x64`. Raises InputError that names the setting."""
    parts = text.lower().split("x")
    sides = [int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) < 9]
    if len(sides) != len(parts) or len(parts) > 2 or not all(SMALLEST <= side <= LARGEST for side in sides):
        raise InputError(f"{setting} is '{text}': give pixels a side, as 64, or height x width, as 48x64, to {LARGEST}")
    return sides[0], sides[-1]


def resized(data: bytes, resize: Resize, drawn: Numbers | None = None) -> Array:
    """The image (C, height, width) uint8 of a picture file, C being 1 for grey, else 3. InputError for no picture."""
    header = jpeg_header(data)
    if header:
        _, height, width, orientation = header
        box = resize.box(width, height, drawn) if orientation < 5 else resize.box(height, width, drawn)
        factor = resize.factor(box)
        while orientation != 1 and (height % factor or width % factor):  # else what libjpeg adds may be turned
            factor //= 2
        pixels = decode_jpeg(data, header, factor)
        if pixels is not None:
            left, top, right, bottom = (edge // factor for edge in box)
            return _scaled(pixels[:, top:bottom, left:right], resize)
    return resized_array(decode_image(data), resize, drawn)


def resized_array(pixels: Array, resize: Resize, drawn: Numbers | None = None) -> Array:
    """The image (C, height, width) of pixels (C, H, W) uint8."""
    _, height, width = pixels.shape
    left, top, right, bottom = resize.box(width, height, drawn)
    return _scaled(pixels[:, top:bottom, left:right], resize)


def _scaled(pixels: Array, resize: Resize) -> Array:
    """Pixels (C, H, W) as (C, height, width): bicubic, by torch, in a fifth of Pillow's time."""
    import torch  # what reads headers alone starts without it

    if pixels.shape[1:] == (resize.height, resize.width):
        return pixels
    if not pixels.flags.writeable or min(pixels.strides) < 0:
        pixels = pixels.copy()
    batch = torch.from_numpy(pixels)[None]
    with decoding():
        scaled = torch.nn.functional.interpolate(batch, (resize.height, resize.width), mode="bicubic", antialias=True)
    image: Array = scaled[0].numpy()
    return image


def channels(pixels: Array, count: int) -> Array:
    """Pixels (C, H, W), C being 1 or 3, as so many channels: grey repeated, or colour's brightness as Pillow has it."""
    if len(pixels) == count:
        return pixels
    if count == 3:
        return np.repeat(pixels, 3, axis=0)
    return to_pixels(to_picture(pixels).convert("L"))
