"""How pictures of any size become images of one size: the largest central window of the upright picture is resized."""

import re
from dataclasses import dataclass

import numpy as np

from naign.data.decode import Array, decode_image, decode_jpeg, decoding, jpeg_shape, to_picture, to_pixels
from naign.errors import InputError

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright picture

SMALLEST = 2  # pixels a side: torch's interpolate fails at 1
LARGEST = 8192  # pixels a side: a colour image is then 805 MB as float32
SPARE = 2.5  # a JPEG is decoded at the least scale at which its window is still so many times the size


@dataclass(kw_only=True, slots=True, frozen=True)
class Resize:
    """How a picture of any size becomes an image."""

    height: int = 0  # of the images, in pixels; 0: as stored, which must be one size, or `crop`
    width: int = 0
    crop: int = 0  # without a height: windows of so many pixels a side, not resized; 0: whole images

    def shape(self, stored: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The images' shape; in the `stored` one 0 is a length that varies. InputError, with `name`, where none is."""
        if len(stored) != 3 and (self.height or self.crop):
            raise InputError(f"data.size and data.crop are of pictures, {name} holds points of {stored}")
        if self.height:
            return stored[0], self.height, self.width
        if self.crop:
            if 0 < min(stored[1:]) < self.crop:
                raise InputError(f"data.crop={self.crop} is more than there is of {name} {stored}")
            return stored[0], self.crop, self.crop
        if 0 in stored:
            raise InputError(f"the pictures of {name} have many sizes: say one, as with --data.size=64")
        return stored

    def box(self, width: int, height: int) -> Box:
        """The largest central window of the images' shape, with edges at whole pixels also of a JPEG that is decoded
        small.
        """
        ratio = self.width / self.height
        wide = min(width, max(1, round(height * ratio)))
        high = min(height, max(1, round(width / ratio)))
        factor = self.factor(wide, high)
        left = (width - wide) // 2
        top = (height - high) // 2
        return (
            left // factor * factor,
            top // factor * factor,
            (left + wide) // factor * factor,
            (top + high) // factor * factor,
        )

    def factor(self, wide: int, high: int) -> int:
        """By how much smaller a JPEG with a window of that size is decoded."""
        room = min(wide / self.width, high / self.height) / SPARE
        for factor in (8, 4, 2):
            if room >= factor:
                return factor
        return 1


def parse_size(text: str, setting: str) -> tuple[int, int]:
    """Height and width in pixels of `64` or `48x64`. Raises InputError that names the setting."""
    match = re.fullmatch(r"(\d{1,4})(x(\d{1,4}))?", text.lower(), re.ASCII)
    if match:
        height = int(match[1])
        width = int(match[3] or height)
        if SMALLEST <= height <= LARGEST and SMALLEST <= width <= LARGEST:
            return height, width
    raise InputError(f"{setting} is '{text}': give pixels a side, as 64, or height x width, as 48x64, to {LARGEST}")


def resized(data: bytes, resize: Resize) -> Array:
    """The image (C, height, width) uint8 of a picture file, C being 1 for grey, else 3. InputError for no picture."""
    shape = jpeg_shape(data)
    if shape:
        _, height, width = shape
        left, top, right, bottom = resize.box(width, height)
        factor = resize.factor(right - left, bottom - top)
        pixels = decode_jpeg(data, shape, factor)
        if pixels is not None:
            rows = slice(top // factor, bottom // factor)
            columns = slice(left // factor, right // factor)
            return _scaled(pixels[:, rows, columns], resize)
    return resized_array(decode_image(data), resize)


def resized_array(pixels: Array, resize: Resize) -> Array:
    """The image (C, height, width) of pixels (C, H, W) uint8."""
    _, height, width = pixels.shape
    left, top, right, bottom = resize.box(width, height)
    return _scaled(pixels[:, top:bottom, left:right], resize)


def _scaled(pixels: Array, resize: Resize) -> Array:
    """Pixels (C, H, W) as (C, height, width): bicubic, by torch, in a fifth of Pillow's time."""
    import torch  # what reads headers alone starts without it

    if pixels.shape[1:] == (resize.height, resize.width):
        return pixels
    if not pixels.flags.writeable or min(pixels.strides) < 0:
        pixels = pixels.copy()
    with decoding():
        scaled = torch.nn.functional.interpolate(
            torch.from_numpy(pixels)[None],
            (resize.height, resize.width),
            mode="bicubic",
            antialias=True,
        )
    image: Array = scaled[0].numpy()
    return image


def channels(pixels: Array, count: int) -> Array:
    """Pixels (C, H, W), C being 1 or 3, as so many channels: grey repeated, or colour's brightness as Pillow has it."""
    if len(pixels) == count:
        return pixels
    if count == 3:
        return np.repeat(pixels, 3, axis=0)
    return to_pixels(to_picture(pixels).convert("L"))
