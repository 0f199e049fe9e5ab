"""What `naign restore` and `naign score` do with files: points, images of the model's size, and pictures at their own
size, which are read as rows of tiles need them and written with alpha and colour profile.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from naign.cli.files import FORMATS, IMAGES, MAP, find_files, read_samples, refuse_overwriting, save, write_one
from naign.data.damage import Kind, degrade
from naign.data.decode import decode_picture, in_mode
from naign.errors import InputError, require
from naign.evaluate.recorded import sees_wholes
from naign.model import tiles
from naign.model.naign import FILLING, NAIGN, Advance
from naign.model.scale import scaled
from naign.observe import pictures
from naign.terminal import counted

MOST = 65500  # pixels of a JPEG's side


def restore_files(
    model: NAIGN,
    files: Sequence[Path],
    to: Path,
    *,
    times: int | None,
    damage: Kind | None,
    mask: Path | None,
    size: str | None,
) -> None:
    """Repair files, into the folder `to`, or one image into that file; `size` as of `naign restore`. All are decoded
    before the first is written, each atomically. With `damage` they are damaged first, which is kept too.
    """
    points = len(model.shape) == 1
    whole = size == "model" or not (size or mask or points) and sees_wholes(model)
    paths, names = zip(*find_files(files, model.shape), strict=True)
    one = len(paths) == 1 and not (damage or points) and to.suffix.lower() in FORMATS
    single = "give a folder; only one picture, without --damage, may go to a file, .png or .jpg"
    require(
        (one or not to.is_file(), f"--to {to} is a file: give a folder, for one picture an image"),
        (one or to.is_dir() or to.suffix.lower() not in (*IMAGES, ".csv"), f"--to {to} ends like a file: {single}"),
        (not (points and (damage or mask)), "--damage and --mask are for images, this model takes points"),
        (not (whole and mask), "--mask is for pictures at their own size: leave out --size model"),
        (not (damage and mask), "--mask keeps what is outside holes, --damage changes it: leave out one"),
    )
    folders = [to, to / damage] if damage else [to]
    outputs = [folder / name.with_suffix(".csv" if points else ".png") for folder in folders for name in names]
    outputs = [to] if one and not to.is_dir() else outputs
    masks = _find_masks(mask, paths, names)
    refuse_overwriting(paths * len(folders), outputs, [path for path in masks if path])
    if points or whole:
        _restore_all(model, paths, outputs, times or 1, damage)
    else:
        total = _count_tiles(paths, model, masks) * ((times or FILLING) if mask else 1)
        with counted("restoring", total=total, unit="tile") as bar:
            for number, (path, hole) in enumerate(zip(paths, masks, strict=True)):
                photo, place = Photo(path, model, hole), outputs[number]
                profile = photo.profile
                large = f"{path}: a JPEG has at most {MOST} pixels a side: give a --to that ends in .png"
                require((max(photo.size) <= MOST or FORMATS[place.suffix.lower()] != "JPEG", large))
                if damage:
                    photo.picture = photo.shown(degrade(photo.rows(0, photo.size[0]), damage), 0)
                    save(photo.picture, outputs[len(paths) + number], profile)
                picture = photo.repaired(model, times, bar.update)
                del photo  # of 100 million pixels it takes 400 MB
                save(picture, place, profile)
    also = f"; as they were damaged: {to / damage}/" if damage else ""
    print(f"{len(names)} restored {'files of points' if points else 'images'}: {outputs[0] if one else f'{to}/'}{also}")
    if whole and not size:
        print(f"each is {model.shape[2]} x {model.shape[1]}, as f has one code for a picture; --size picture: in tiles")


def _restore_all(model: NAIGN, paths: Sequence[Path], outputs: Sequence[Path], times: int, damage: Kind | None) -> None:
    """Repair points, or images that are resized to the model's size."""
    originals = read_samples(paths, model)
    damaged = degrade(torch.cat(originals), damage) if damage else torch.cat(originals)
    with counted("restoring", total=len(damaged), unit="sample") as bar:
        repaired = model.project(damaged, times=times, advance=bar.update).cpu()
    sizes = [len(batch) for batch in originals]
    batches = [*repaired.split(sizes), *(damaged.split(sizes) if damage else ())]
    for place, samples in counted("writing", list(zip(outputs, batches, strict=True)), unit="file"):
        write_one(samples, place)


def _find_masks(mask: Path | None, paths: Sequence[Path], names: Sequence[Path]) -> Sequence[Path | None]:
    """The mask of each picture: the file `mask`, or in the folder `mask` that of its name, with any suffix."""
    if mask is None or not mask.is_dir():
        return [mask] * len(paths)
    pictures, by_name = {path.resolve() for path in paths}, defaultdict(list)
    for path, name in find_files([mask], (1, 1, 1)):
        if path.resolve() not in pictures:
            by_name[name.with_suffix("")].append(path)
    for path, name in zip(paths, names, strict=True):
        fitting = by_name[name.with_suffix("")]
        missing = f"--mask {mask} holds no mask for {path}: add {name.with_suffix('.png')}, or leave that picture out"
        inside = f"--mask {mask} holds {path} itself, and no mask for it: give the folder of the masks"
        more = f"--mask {mask} holds several for {path}: keep one of {', '.join(map(str, fitting))}"
        itself = not fitting and mask.resolve() in path.resolve().parents
        require((not itself, inside), (fitting, missing), (len(fitting) == 1, more))
    return [by_name[name.with_suffix("")][0] for name in names]


def score_files(
    model: NAIGN, files: Sequence[Path], *, times: int, map: bool
) -> tuple[list[tuple[Path, int]], list[float]]:
    """(path, line) and energy of each image, whose line is 1, or point; with `map` of images at their own size."""
    require((len(model.shape) == 3 or not map, "--map is for images, this model takes points"))
    paths = [path for path, _ in find_files(files, model.shape)]
    if map:
        maps = [path.with_name(path.name + MAP) for path in paths]
        refuse_overwriting(paths, maps)
        return [(path, 1) for path in paths], map_photos(paths, maps, model, times=times)
    originals = read_samples(paths, model)
    places = [(path, line) for path, x in zip(paths, originals, strict=True) for line in range(1, 1 + len(x))]
    with counted("scoring", total=len(places), unit="sample") as bar:
        return places, model.energy(torch.cat(originals), times=times, advance=bar.update).tolist()


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
        """Rows of the box with this picture's alpha, so that on white they show; `filled`: an alpha of 0 is 255."""
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
            save(picture, place)
    return energies


def _count_tiles(paths: Sequence[Path], model: NAIGN, masks: Sequence[Path | None]) -> int:
    """Of all pictures, each of which is decoded, so that none is refused when some are done."""
    pairs = counted("reading", list(zip(paths, masks, strict=True)), unit="image")
    return sum(Photo(path, model, mask).tiles for path, mask in pairs)
