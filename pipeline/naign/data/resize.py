"""How pictures of any size become images of one size, as in torchvision: a window of the upright picture is resized."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from naign.data.decode import Array, decode_image, decode_jpeg, decoding, jpeg_header
from naign.errors import InputError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright picture
Numbers = npt.NDArray[np.float64]

FITS = ("crop", "random")
LARGEST = 8192  # pixels a side: a colour image is then 805 MB as float32
SCALE, RATIO = (0.08, 1.0), (0.75, 1.3333)  # of random windows: share of the area, width by height; as torchvision's
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
        if not self.crop and 0 in stored:
            raise InputError(f"the pictures of {name} have many sizes: say one, as with --data.size=64")
        return (stored[0], self.crop, self.crop) if self.crop else stored

    def box(self, width: int, height: int, drawn: Numbers | None = None) -> Box:
        """The window of a picture; where it is random, WINDOW numbers in [0, 1) decide, and None: the central one."""
        if self.fit == "random" and drawn is not None:
            return self._random(width, height, drawn)
        wide = self.width / self.height  # as Pillow's ImageOps.fit with its defaults
        if width / height == wide:
            return 0.0, 0.0, float(width), float(height)
        kept = (float(width), width / wide) if width / height < wide else (wide * height, float(height))
        left, top = (width - kept[0]) * 0.5, (height - kept[1]) * 0.5
        return left, top, left + kept[0], top + kept[1]

    def _random(self, width: int, height: int, drawn: Numbers) -> Box:
        (least, most), (narrow, wide) = SCALE, (math.log(value) for value in RATIO)
        for area, shape in drawn[: 2 * TRIES].reshape(TRIES, 2).tolist():
            area, shape = width * height * (least + (most - least) * area), math.exp(narrow + (wide - narrow) * shape)
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(drawn[-2] * (height - h + 1)), int(drawn[-1] * (width - w + 1))
                unit = self.factor((0, 0, w, h))  # whole pixels also of a JPEG that is decoded small
                edges = (edge // unit * unit for edge in (left, top, left + w, top + h))
                return tuple(map(float, edges))  # type: ignore[return-value]
        shape = min(max(width / height, RATIO[0]), RATIO[1])
        w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
        left, top = (width - w) // 2, (height - h) // 2
        return float(left), float(top), float(left + w), float(top + h)

    def factor(self, box: Box) -> int:
        """By how much smaller a JPEG is decoded."""
        room = min((box[2] - box[0]) / self.width, (box[3] - box[1]) / self.height) / SPARE
        return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def parse_size(text: str, setting: str) -> tuple[int, int]:
    """Height and width in pixels of `64` or `48x64`. Raises InputError that names the setting."""
    parts = text.lower().split("x")
    sides = [int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) < 9]
    if len(sides) != len(parts) or len(parts) > 2 or not all(1 <= side <= LARGEST for side in sides):
        raise InputError(f"{setting} is '{text}': give pixels a side, as 64, or height x width, as 48x64, to {LARGEST}")
    return sides[0], sides[-1]


def resized(data: bytes, resize: Resize, drawn: Numbers | None = None) -> Array:
    """The image (C, height, width) uint8 of a picture file, C being 1 for grey, else 3. InputError for no picture."""
    if header := jpeg_header(data):
        _, height, width, orientation = header
        box = resize.box(*((height, width) if orientation >= 5 else (width, height)), drawn)
        factor = resize.factor(box)
        while orientation != 1 and (height % factor or width % factor):  # else what libjpeg adds may be turned
            factor //= 2
        pixels = decode_jpeg(data, header, factor)
        if pixels is not None:
            return _cut(pixels, resize, box, factor)
    return resized_array(decode_image(data), resize, drawn)


def resized_array(array: Array, resize: Resize, drawn: Numbers | None = None) -> Array:
    """The image (C, height, width) of pixels (C, H, W) uint8."""
    height, width = array.shape[1:]
    return _cut(array, resize, resize.box(width, height, drawn), 1)


def _cut(array: Array, resize: Resize, box: Box, factor: int) -> Array:
    """The window of an upright picture, decoded at 1/factor of its size, as an image (C, height, width): bicubic, by
    torch, in a fifth of Pillow's time, or by Pillow where the window is not of whole pixels.
    """
    channels, height, width = array.shape
    left, top, right, bottom = (edge / factor for edge in box)
    box = left, top, min(right, width), min(bottom, height)
    target = resize.width, resize.height
    inside = array[:, int(top) : int(bottom), int(left) : int(right)]
    if min(target) > 1 and box == tuple(map(int, box)) and inside.shape[1:] != array.shape[1:]:
        import torch  # what reads headers alone starts without it

        plain = inside if inside.flags.writeable and min(inside.strides) > 0 else inside.copy()
        batch = torch.from_numpy(plain)[None]
        with decoding():
            small = torch.nn.functional.interpolate(batch, target[::-1], mode="bicubic", antialias=True)[0]
        pixels: Array = small.numpy()
        return pixels
    whole = np.ascontiguousarray(array[0] if channels == 1 else array.transpose(1, 2, 0))
    with decoding():
        picture = Image.fromarray(whole).resize(target, Image.Resampling.BICUBIC, box)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def channels(pixels: Array, count: int) -> Array:
    """Pixels (C, H, W), C being 1 or 3, as so many channels: grey repeated, or colour's brightness as Pillow has it."""
    if len(pixels) == count:
        return pixels
    if count == 3:
        return np.repeat(pixels, 3, axis=0)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L"))[None]
