"""What `naign restore` and `naign score` do with files of images or points."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.cli.files import FORMATS, IMAGES, MAP, find_files, read_samples, refuse_overwriting, write_one
from pipeline.cli.photos import map_photos, restore_photos
from pipeline.data.degrade import Kind, degrade
from pipeline.errors import require
from pipeline.model.naign import NAIGN
from pipeline.terminal import counted


def restore_files(
    model: NAIGN,
    files: Sequence[Path],
    to: Path,
    *,
    times: int | None,
    damage: Kind | None,
    mask: Path | None,
    whole: bool,
) -> None:
    """Repair files, into the folder `to`, or one image into that file; `whole`: images resized to the model's size."""
    points = len(model.shape) == 1
    paths, names = zip(*find_files(files, model.shape), strict=True)
    one = len(paths) == 1 and not (damage or points or whole) and to.suffix.lower() in FORMATS
    single = "give a folder; only one picture, restored at its own size, may go to a file, .png or .jpg"
    require(
        (one or not to.is_file(), f"--to {to} is a file: give a folder, for one picture an image"),
        (one or to.is_dir() or to.suffix.lower() not in (*IMAGES, ".csv"), f"--to {to} ends like a file: {single}"),
        (not (points and damage), f"--damage {damage} is for images, this model takes points"),
        (not (points and mask), f"--mask {mask} is for images, this model takes points"),
        (not (whole and mask), "--mask is for pictures at their own size: leave out --size model"),
        (not (damage and mask), "--mask keeps what is outside holes, --damage changes it: leave out one"),
    )
    folders = [to, to / damage] if damage else [to]
    outputs = [folder / name.with_suffix(".csv" if points else ".png") for folder in folders for name in names]
    outputs = [to] if one and not to.is_dir() else outputs
    masks = _find_masks(mask, paths, names)
    refuse_overwriting(paths * len(folders), outputs, [path for path in masks if path])
    if points or whole:
        _restore_batch(model, paths, outputs, times=times or 1, damage=damage)
    else:
        restore_photos(paths, outputs, model, times=times, damage=damage, masks=masks)
    also = f"; as they were damaged: {to / damage}/" if damage else ""
    print(f"{len(names)} restored {'files of points' if points else 'images'}: {outputs[0] if one else f'{to}/'}{also}")


def _restore_batch(
    model: NAIGN, paths: Sequence[Path], outputs: Sequence[Path], *, times: int, damage: Kind | None
) -> None:
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
    """The mask of each picture: the file `mask`, or in the folder `mask` the one of the picture's name, which may lie
    beside the picture with another suffix.
    """
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
        require((fitting or mask.resolve() not in path.resolve().parents, inside), (fitting, missing))
        require(
            (len(fitting) == 1, f"--mask {mask} holds several for {path}: keep one of {', '.join(map(str, fitting))}")
        )
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
