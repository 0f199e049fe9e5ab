"""What `naign restore` and `naign score` do with files: points, and pictures at the model's size or their own."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from naign.cli.files import FORMATS, IMAGES, MAP, find_files, read_samples, refuse_overwriting, save, write_one
from naign.data.damage import Kind, degrade
from naign.errors import require
from naign.evaluate.recorded import sees_wholes
from naign.model.naign import NAIGN
from naign.model.photos import Photo, read_hole, read_picture
from naign.terminal import counted


def restore_files(
    model: NAIGN,
    files: Sequence[Path],
    *,
    to: Path,
    times: int | None,
    damage: Kind | None,
    mask: Path | None,
    size: str | None,
) -> None:
    """Repair files, with the options of `naign restore`. All are decoded before the first is written."""
    points = len(model.shape) == 1
    resized = size == "model"
    if not (points or size or mask):
        resized = sees_wholes(model)
    require(
        (not (points and (damage or mask)), "--damage and --mask are for images, this model takes points"),
        (not (resized and mask), "--mask is for pictures at their own size: leave out --size model"),
        (not (damage and mask), "--mask keeps what is outside holes, --damage changes it: leave out one"),
    )
    found = find_files(files, model.shape)
    paths = [path for path, _ in found]
    suffix = ".csv" if points else ".png"
    names = [name.with_suffix(suffix) for _, name in found]
    outputs = [to / name for name in names]
    place = f"{to}/"
    if not to.is_dir() and to.suffix.lower() in (*IMAGES, ".csv"):
        single = len(found) == 1 and not (damage or points) and to.suffix.lower() in FORMATS
        remedy = "give a folder; only one picture, without --damage, may go to a file, .png or .jpg"
        require((single, f"--to {to} ends like a file: {remedy}"))
        outputs = [to]
        place = str(to)
    damaged = list[Path]()
    inputs = paths
    if damage:
        damaged = [to / damage / name for name in names]
        inputs = paths + paths
    refuse_overwriting(inputs, outputs + damaged, [mask] if mask else [])
    if points or resized:
        samples = read_samples(paths, model)
        for number, output in enumerate(counted("restoring", outputs, unit="file")):
            given = samples[number]
            if damage:
                given = degrade(given, damage, seed=number)
                write_one(given, damaged[number])
            write_one(model.project(given, times=times).cpu(), output)
    else:
        _check_pictures(paths, mask)
        with counted("restoring", outputs, unit="image") as bar:
            for number, output in enumerate(bar):
                photo = Photo(read_picture(paths[number]), model, advance=lambda _: bar.update(0))
                profile = photo.profile
                if damage:
                    photo.picture = photo.shown(degrade(photo.values(), damage))
                    save(photo.picture, damaged[number], profile)
                if mask:
                    repaired = photo.filled(read_hole(mask, photo.picture.size), times)
                else:
                    repaired = photo.repaired(times or 1)
                save(repaired, output, profile)
    print(f"{len(paths)} restored: {place}")
    if damage:
        print(f"as they were damaged: {to / damage}/")
    if resized and size is None:
        _, height, width = model.shape
        print(f"each is {width} x {height}, as f has one code for a picture; --size picture: in tiles")


def _check_pictures(paths: Sequence[Path], mask: Path | None = None) -> None:
    """Decode all pictures, so that none is refused once others are written."""
    for path in counted("reading", paths, unit="image"):
        picture = read_picture(path)
        if mask:
            read_hole(mask, picture.size)


def score_files(model: NAIGN, files: Sequence[Path], *, times: int, map: bool) -> list[tuple[str, float]]:
    """The path and energy of each image, or `path:line` and that of each point; `map`: see `naign score`."""
    points = len(model.shape) == 1
    require((not (points and map), "--map is for images, this model takes points"))
    paths = [path for path, _ in find_files(files, model.shape)]
    if map:
        return _map_photos(model, paths, times)
    samples = read_samples(paths, model)
    places = []
    for path, content in zip(paths, samples, strict=True):
        if points:
            places += [f"{path}:{line}" for line in range(1, 1 + len(content))]
        else:
            places.append(str(path))
    with counted("scoring", total=len(places), unit="sample") as bar:
        energies = model.energy(torch.cat(samples), times=times, advance=bar.update).tolist()
    for place, energy in zip(places, energies, strict=True):
        require((math.isfinite(energy), f"{place}: its energy is beyond float32: leave it out"))
    return list(zip(places, energies, strict=True))


def _map_photos(model: NAIGN, paths: Sequence[Path], times: int) -> list[tuple[str, float]]:
    """The energy of each picture at its own size. The map of |f(x) - x| is written beside it."""
    maps = [path.with_name(path.name + MAP) for path in paths]
    refuse_overwriting(paths, maps)
    _check_pictures(paths)
    energies = []
    with counted("scoring", paths, unit="image") as bar:
        for path, place in zip(bar, maps, strict=True):
            photo = Photo(read_picture(path), model, advance=lambda _: bar.update(0))
            shades, energy = photo.mapped(times)
            save(shades, place)
            energies.append((str(path), energy))
    return energies
