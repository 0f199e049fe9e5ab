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
from pipeline.data.decode import decode_picture, in_mode
from pipeline.data.degrade import Kind, degrade
from pipeline.errors import InputError, require
from pipeline.model import tiles
from pipeline.model.naign import FILLING, NAIGN, Advance
from pipeline.model.scale import scaled
from pipeline.observe import pictures
from pipeline.storage.local import write_atomically
from pipeline.terminal import counted

MOST = 65500  # pixels of a JPEG's side


class Photo:
    """A picture file, decoded and upright, for a model of images, and where it has holes if there is a mask.

    Rows are float32 in [-1, 1], (1, C, r, W) with the model's C. Transparent pixels are seen on white, as in training.
    Raises InputError, with the path, for what is no picture, and for a mask that does not fit.
    """

    def __init__(self, path: Path, model: NAIGN, mask: Path | None = None) -> None:
        self.picture = _decode(path)
        self.mode = "L" if model.shape[0] == 1 else "RGB"
        self.alpha = self.picture.has_transparency_data
        self.size = (self.picture.height, self.picture.width)
        self.box = (0, 0, *self.picture.size)  # left, top, right, bottom of what is computed
        self.hole = _read_hole(mask, path, self.picture.size) if mask else None
        if self.hole:  # with what a tile sees around it
            left, top, right, bottom = self.hole.getbbox() or self.box
            (_, high, wide), (height, width) = model.shape, self.size
            self.box = max(0, left - wide), max(0, top - high), min(width, right + wide), min(height, bottom + high)
        left, top, right, bottom = self.box
        self.tiles = tiles.count((bottom - top, right - left), (model.shape[1], model.shape[2]))
        profile = self.picture.info.get("icc_profile") or b""
        self.profile = profile if profile[16:20] == {"L": b"GRAY", "RGB": b"RGB "}[self.mode] else None

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of what is in the box."""
        left, top, right, _ = self.box
        picture = self._flat(self.picture.crop((left, top + first, right, top + last)))
        pixels = np.asarray(picture).reshape(last - first, right - left, -1).transpose(2, 0, 1)
        return scaled(torch.from_numpy(pixels.copy())[None])

    def shown(self, rows: Tensor, first: int, *, filled: bool = False) -> Image.Image:
        """Rows of the box as a picture with this one's alpha: on white it shows them. `filled`: where alpha is 0 it
        becomes 255.
        """
        left, top, right, _ = self.box
        alpha = None
        if self.alpha:
            strip = self.picture.crop((left, top + first, right, top + first + rows.shape[2]))
            alpha = strip.convert("RGBA").getchannel("A")
            if filled:
                alpha = alpha.point([255, *range(1, 256)])
            rows = 1 - (1 - rows) / torch.from_numpy(np.asarray(alpha) / np.float32(255)).clamp(min=1 / 255)
        pixels = pictures.eight_bits(rows[0]).permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if self.mode == "L" else pixels))
        if alpha:
            picture.putalpha(alpha)
        return picture

    def repaired(self, model: NAIGN, times: int | None, advance: Advance) -> Image.Image:
        """The whole picture by f; with holes only these, all other pixels are the picture's."""
        left, top, right, bottom = self.box
        if self.hole:
            whole = self.picture.convert("RGBA").convert(f"{self.mode}A") if self.alpha else self._flat(self.picture)
            hole = self.hole.crop(self.box)
            mask = torch.from_numpy(np.array(hole) > 0)
            made = model.project(self.rows(0, bottom - top), times=times, mask=mask, advance=advance)
            whole.paste(self.shown(made, 0, filled=True), (left, top), hole)
            return whole
        whole = Image.new(f"{self.mode}A" if self.alpha else self.mode, self.picture.size)
        for rows in model.bands(self.rows, self.size, times=times or 1, advance=advance):
            whole.paste(self.shown(rows, top), (0, top))
            top += rows.shape[2]
        return whole

    def _flat(self, picture: Image.Image) -> Image.Image:
        return in_mode(picture, "L" if picture.mode == "L" else "RGB").convert(self.mode)


def _read_hole(mask: Path, path: Path, size: tuple[int, int]) -> Image.Image:
    """Where a mask is white, in mode L of 0 and 255."""
    hole = in_mode(_decode(mask), "L").point([0] * 128 + [255] * 128)
    least, most = hole.getextrema()
    other = f"--mask {mask} has {hole.width} x {hole.height} pixels, {path} {size[0]} x {size[1]}: make them equal"
    require(
        (hole.size == size, other),
        (most, f"--mask {mask} has no hole: paint what is to be filled white"),
        (not least, f"--mask {mask} is a hole altogether: paint what is to be kept black"),
    )
    return hole


def _decode(path: Path) -> Image.Image:
    data = path.read_bytes()
    try:
        picture = decode_picture(data)
        return in_mode(picture, "L") if picture.mode.startswith("I") else picture
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def restore_photos(
    paths: Sequence[Path],
    outputs: Sequence[Path],
    model: NAIGN,
    *,
    times: int | None,
    damage: Kind | None,
    masks: Sequence[Path | None],
) -> None:
    """Repair pictures at their own size. All are decoded before the first is written, and each is written atomically.

    With `damage` they are damaged first; the second half of `outputs` is for the damaged ones. Of a picture with a mask
    holes are filled, and nothing else changes.
    """
    total = _count_tiles(paths, model, masks) * ((times or FILLING) if any(masks) else 1)
    with counted("restoring", total=total, unit="tile") as bar:
        for number, (path, mask) in enumerate(zip(paths, masks, strict=True)):
            photo, place = Photo(path, model, mask), outputs[number]
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
    with counted("scoring", total=_count_tiles(paths, model, [None] * len(paths)), unit="tile") as bar:
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


def _count_tiles(paths: Sequence[Path], model: NAIGN, masks: Sequence[Path | None]) -> int:
    """Of all pictures, each of which is decoded, so that none is refused when some are done."""
    pairs = counted("reading", list(zip(paths, masks, strict=True)), unit="image")
    return sum(Photo(path, model, mask).tiles for path, mask in pairs)


def save(picture: Image.Image, to: Path, profile: bytes | None) -> None:
    """Write a picture atomically in the format of its suffix; as JPEG without alpha, on white."""
    content, kind = io.BytesIO(), FORMATS[to.suffix.lower()]
    if kind == "JPEG":
        picture = in_mode(picture, "L" if picture.mode in ("L", "LA") else "RGB")
    picture.save(content, kind, quality=95, icc_profile=profile)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, content.getvalue(), sync=False)
