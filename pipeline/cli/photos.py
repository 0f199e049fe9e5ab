"""Pictures at their own size: read as rows of tiles need them, repaired, and written with alpha and colour profile."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.cli.files import FORMATS
from pipeline.data.decode import decode_picture, eight_bits
from pipeline.data.degrade import Kind, degrade
from pipeline.errors import InputError, require
from pipeline.model import tiles
from pipeline.model.naign import NAIGN, Advance
from pipeline.model.scale import scaled
from pipeline.observe import pictures
from pipeline.storage.local import write_atomically
from pipeline.terminal import counted

MOST = 65500  # pixels of a JPEG's side


class Photo:
    """A picture file, decoded and upright, for a model of images. InputError, with its path, for what is none.

    Rows are float32 in [-1, 1], (1, C, r, W) with the model's C. Transparent pixels are seen on white, as in training.
    """

    def __init__(self, path: Path, model: NAIGN) -> None:
        try:
            picture = decode_picture(path.read_bytes())
            self.picture = eight_bits(picture, "L") if picture.mode.startswith("I") else picture
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        self.mode = "L" if model.shape[0] == 1 else "RGB"
        self.size = (self.picture.height, self.picture.width)
        self.tiles = tiles.count(self.size, (model.shape[1], model.shape[2]))
        profile = self.picture.info.get("icc_profile") or b""
        self.profile = profile if profile[16:20] == {"L": b"GRAY", "RGB": b"RGB "}[self.mode] else None

    def _strip(self, first: int, last: int) -> Image.Image:
        return self.picture.crop((0, first, self.picture.width, last))

    def rows(self, first: int, last: int) -> Tensor:
        strip = self._strip(first, last)
        picture = eight_bits(strip, "L" if strip.mode == "L" else "RGB").convert(self.mode)
        pixels = np.asarray(picture).reshape(last - first, picture.width, -1).transpose(2, 0, 1)
        return scaled(torch.from_numpy(pixels.copy())[None])

    def shown(self, rows: Tensor, first: int) -> Image.Image:
        """Rows as a picture with this one's alpha: on white it shows them."""
        strip, alpha = self._strip(first, first + rows.shape[2]), None
        if strip.has_transparency_data:
            alpha = strip.convert("RGBA").getchannel("A")
            rows = 1 - (1 - rows) / torch.from_numpy(np.asarray(alpha) / np.float32(255)).clamp(min=1 / 255)
        pixels = pictures.eight_bits(rows[0]).permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if self.mode == "L" else pixels))
        if alpha:
            picture.putalpha(alpha)
        return picture

    def repaired(self, model: NAIGN, times: int, advance: Advance) -> Image.Image:
        mode = {"L": "LA", "RGB": "RGBA"}[self.mode] if self.picture.has_transparency_data else self.mode
        whole, top = Image.new(mode, self.picture.size), 0
        for rows in model.bands(self.rows, self.size, times=times, advance=advance):
            whole.paste(self.shown(rows, top), (0, top))
            top += rows.shape[2]
        return whole


def restore_photos(
    paths: Sequence[Path], outputs: Sequence[Path], model: NAIGN, *, times: int, damage: Kind | None
) -> None:
    """Repair pictures at their own size. All are decoded before the first is written, and each is written atomically.

    With `damage` they are damaged first; the second half of `outputs` is for the damaged ones.
    """
    total = _count_tiles(paths, model)
    with counted("restoring", total=total, unit="tile") as bar:
        for number, path in enumerate(paths):
            photo, place = Photo(path, model), outputs[number]
            profile = photo.profile
            large = f"{path}: a JPEG has at most {MOST} pixels a side: give a --to that ends in .png"
            require((max(photo.size) <= MOST or FORMATS[place.suffix.lower()] != "JPEG", large))
            if damage:
                photo.picture = photo.shown(degrade(photo.rows(0, photo.size[0]), damage), 0)
                save(photo.picture, outputs[len(paths) + number], profile)
            picture = photo.repaired(model, times, bar.update)
            del photo  # of 100 million pixels it takes 400 MB
            save(picture, place, profile)


def map_photos(paths: Sequence[Path], maps: Sequence[Path], model: NAIGN, *, times: int) -> list[float]:
    """The energy of each picture at its own size. The map of |f(x) - x|, its mean over channels, is written to `maps`
    as grey PNGs of the pictures' sizes: black is 0, white is 1 or more.
    """
    energies = []
    with counted("scoring", total=_count_tiles(paths, model), unit="tile") as bar:
        for path, place in zip(paths, maps, strict=True):
            photo = Photo(path, model)
            picture, top, total = Image.new("L", photo.picture.size), 0, 0.0
            for rows in model.bands(photo.rows, photo.size, times=times, advance=bar.update):
                moved = rows - photo.rows(top, top + rows.shape[2])
                shades = pictures.eight_bits(2 * moved.abs().mean(1)[0] - 1)
                picture.paste(Image.fromarray(shades.numpy()), (0, top))
                total += float(moved.double().square().sum())
                top += rows.shape[2]
            energies.append(total / (model.shape[0] * math.prod(photo.size)))
            save(picture, place, None)
    return energies


def _count_tiles(paths: Sequence[Path], model: NAIGN) -> int:
    """Of all pictures, each of which is decoded, so that none is refused when some are done."""
    return sum(Photo(path, model).tiles for path in counted("reading", paths, unit="image"))


def save(picture: Image.Image, to: Path, profile: bytes | None) -> None:
    """Write a picture atomically in the format of its suffix; as JPEG without alpha, on white."""
    content, kind = io.BytesIO(), FORMATS[to.suffix.lower()]
    if kind == "JPEG":
        picture = eight_bits(picture, "L" if picture.mode in ("L", "LA") else "RGB")
    picture.save(content, kind, quality=95, icc_profile=profile)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, content.getvalue(), sync=False)
