"""Pictures of any size and mode through a model of images: repaired, filled, and the map of what f changes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from naign.data.decode import decode_picture, in_mode, to_picture, to_pixels
from naign.data.scale import scaled
from naign.errors import InputError, require
from naign.model.naign import NAIGN, Advance
from naign.observe.pictures import eight_bits


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


class Photo:
    """A picture for a model of images, which sees transparent pixels on white, as in training."""

    def __init__(self, picture: Image.Image, model: NAIGN, *, advance: Advance = None) -> None:
        self.picture = picture
        self.model = model
        self.advance = advance  # called while f is applied
        self.mode = "RGB"
        if model.shape[0] == 1:
            self.mode = "L"

    @property
    def profile(self) -> bytes | None:
        """The colour profile, where it fits the repaired picture."""
        profile: bytes = self.picture.info.get("icc_profile") or b""
        space = b"RGB "
        if self.mode == "L":
            space = b"GRAY"
        if profile[16:20] != space:
            return None
        return profile

    @property
    def alpha(self) -> Image.Image | None:
        if self.picture.has_transparency_data:
            return self.picture.convert("RGBA").getchannel("A")
        return None

    def values(self) -> Tensor:
        """(1, C, H, W) float32 in [-1, 1], with the model's C."""
        pixels = to_pixels(in_mode(self.picture, self.mode))
        return scaled(torch.from_numpy(pixels.copy())[None])

    def shown(self, values: Tensor, *, seen: bool = False) -> Image.Image:
        """Values as a picture with this one's alpha, so that on white they show; `seen`: transparent pixels as well."""
        alpha = self.alpha
        if alpha and seen:
            alpha = alpha.point([255, *range(1, 256)])
        if alpha:
            opacity = torch.from_numpy(np.array(alpha)) / 255
            values = 1 - (1 - values) / opacity.clamp(min=1 / 255)
        picture = to_picture(eight_bits(values[0]).numpy())
        if alpha:
            picture.putalpha(alpha)
        return picture

    def repaired(self, times: int) -> Image.Image:
        """The picture after `times` applications of f."""
        mode = self.mode
        if self.picture.has_transparency_data:
            mode += "A"
        whole = Image.new(mode, self.picture.size)
        for top, rows, made in self._applied(times):
            whole.paste(rows.shown(made), (0, top))
        return whole

    def mapped(self, times: int) -> tuple[Image.Image, float]:
        """The map of |f(x) - x|, its mean over channels, in grey: black is 0, white 1 or more; and the energy."""
        whole = Image.new("L", self.picture.size)
        total = 0.0
        for top, rows, made in self._applied(times):
            moved = made - rows.values()
            shades = eight_bits(2 * moved.abs().mean(1) - 1)
            whole.paste(to_picture(shades.numpy()), (0, top))
            total += float(moved.double().square().mean(1).sum())
        return whole, total / (whole.width * whole.height)

    def _applied(self, times: int) -> Iterator[tuple[int, "Photo", Tensor]]:
        """f of the picture as bands of rows: the first row, the rows, and what f makes of them."""
        width, height = self.picture.size

        def part(first: int, last: int) -> Photo:
            return Photo(self.picture.crop((0, first, width, last)), self.model)

        def read(first: int, last: int) -> Tensor:
            return part(first, last).values()

        top = 0
        for made in self.model.bands(read, (height, width), times, self.advance):
            bottom = top + made.shape[2]
            yield top, part(top, bottom), made
            top = bottom

    def filled(self, hole: Image.Image, times: int | None) -> Image.Image:
        """The picture with its hole (mode L, 255 in it) filled from what a tile sees around it; all else stays."""
        _, height, width = self.model.shape
        left, top, right, bottom = hole.getbbox() or (0, 0, *hole.size)
        box = (
            max(0, left - width),
            max(0, top - height),
            min(hole.width, right + width),
            min(hole.height, bottom + height),
        )
        hole = hole.crop(box)
        part = Photo(self.picture.crop(box), self.model)
        mask = torch.from_numpy(np.array(hole) > 0)
        made = self.model.project(
            part.values(),
            times=times,
            mask=mask,
            advance=self.advance,
        )
        whole = in_mode(self.picture, self.mode)
        if self.alpha:
            whole = self.picture.convert("RGBA").convert(f"{self.mode}A")
        whole.paste(part.shown(made, seen=True), box[:2], hole)
        return whole
