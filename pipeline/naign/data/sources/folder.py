"""Any tree of pictures as a source: each is turned upright, cropped to one shape, resized, and labelled."""

import logging
import os
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

from naign.data.decode import decoding, in_mode, open_picture
from naign.data.order import shuffled
from naign.data.resize import parse_size
from naign.data.sources.source import Example, Made, Source
from naign.errors import InputError, require

log = logging.getLogger(__name__)

WINDOWS = ("Thumbs.db", "desktop.ini")  # files that Windows leaves in folders of pictures
NAMED = 20  # skipped files that are named; of more only the number is logged
TEST_SHARE = 0.1  # of the pictures, where the tree has no train/ and test/


class Picture(NamedTuple):
    """One file of the tree."""

    file: Path
    path: PurePosixPath  # relative to the tree, or to its train/ or test/
    where: str  # for messages

    @property
    def top(self) -> str:
        """The name of its first folder, or ""."""
        return self.path.parts[0] if len(self.path.parts) > 1 else ""


def from_tree(name: str, root: Path, *, size: str | int, channels: int, seed: int = 0, skip: bool = False) -> Source:
    """The pictures under `root`, the name of a picture's first folder being its label (none if any lies outside), with
    `size` pixels a side, or height x width as 48x64, and 3 channels (colour) or 1 (grey).

    The splits are the top folders train/ and test/ where both are there, else a tenth, drawn by the seed, is the test
    split. Names that start with a dot and WINDOWS are passed over, and with `skip`, which decodes every picture once
    more, files that are no picture. Raises InputError, naming the file, for other such files and for broken links.
    """
    require((channels in (1, 3), f"no {channels} channels: use --channels 1 or 3"))
    height, width = parse_size(str(size), "--size")
    pictures = _pictures(root)
    if skip:
        pictures = _decodable(pictures, root, (width, height), channels)
    require((len(pictures) > 1, f"{root}: {len(pictures)} pictures, and at least 2 are needed: check the path"))
    empty = {"train", "test"} - {picture.path.parts[0] for picture in pictures}
    if empty and (root / "train").is_dir() and (root / "test").is_dir():
        raise InputError(f"{root}: {min(empty)}/ holds no pictures: put some there, or remove it")
    splits = _split(pictures, seed)
    names = {picture.top for group in splits.values() for picture in group}
    labels = () if "" in names else tuple(sorted(names))
    if "" in names and len(names) > 1:
        inside = ", ".join(sorted(names - {""}))
        log.warning("no labels: pictures lie in %s, but others in no folder; move these into one for labels", inside)
    made = {split: _examples(group, labels, (width, height), channels) for split, group in splits.items()}
    return Source(name=name or "folder", kind="image", shape=(channels, height, width), labels=labels, splits=made)


def fitted(data: bytes, size: tuple[int, int], channels: int) -> Image.Image:
    """The largest central window of an upright picture at (width, height). InputError says why there is none."""
    with decoding(), open_picture(data) as opened:
        upright = in_mode(ImageOps.exif_transpose(opened), "L" if channels == 1 else "RGB")
        return ImageOps.fit(upright, size, method=Image.Resampling.LANCZOS)


def _pictures(root: Path) -> list[Picture]:
    """The files of the tree, in order."""
    require((root.is_dir(), f"{root}: no such folder: give a folder of pictures with --root; unpack an archive first"))

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}): check the owner and mode of the folder")

    pictures, paths = list[Picture](), list[Path]()
    for folder, inner, files in os.walk(root, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        paths += [Path(folder, name) for name in (*inner, *files) if not name.startswith((".", *WINDOWS))]
    for path in sorted(paths):
        if path.is_file():
            pictures.append(Picture(path, PurePosixPath(path.relative_to(root)), _printable(str(path))))
        elif path.is_symlink() or not path.is_dir():
            what = "neither file nor folder, or a link that leads to no file"
            raise InputError(f"{path}: {what}: remove it, or put the file itself there")
    return pictures


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def _decodable(pictures: list[Picture], root: Path, size: tuple[int, int], channels: int) -> list[Picture]:
    from joblib import cpu_count  # of the cores that this process may use

    def problem(picture: Picture) -> str:
        """Why its bytes are no picture, or ''. InputError where they cannot be read or decoded for another reason."""
        try:
            fitted(picture.file.read_bytes(), size, channels)
        except OSError as error:
            raise InputError(f"{picture.where}: cannot be read ({error.strerror}): check its owner and mode") from None
        except InputError as error:
            if not isinstance(error.__context__, MemoryError):
                return str(error)
            raise InputError(f"{picture.where}: not enough memory to decode it: free some, or remove it") from None
        return ""

    # Threads, as decoding releases the interpreter's lock.
    reasons = thread_map(problem, pictures, max_workers=cpu_count(), desc="decode folder", unit="picture")
    checked = list(zip(pictures, reasons, strict=True))
    broken = [f"{picture.where}: {reason}" for picture, reason in checked if reason]
    for what in broken[:NAMED]:
        log.warning("%s: passed over", what)
    if len(broken) > NAMED:
        log.warning("%s: %d more files that are no picture: passed over", root, len(broken) - NAMED)
    return [picture for picture, reason in checked if not reason]


def _split(pictures: list[Picture], seed: int) -> dict[str, list[Picture]]:
    tops = {picture.top for picture in pictures}
    if {"train", "test"} <= tops:
        if odd := next((picture for picture in pictures if picture.top not in ("train", "test")), None):
            raise InputError(f"{odd.where}: lies beside train/ and test/: move it into one of them")
        inside = [(picture.top, picture._replace(path=PurePosixPath(*picture.path.parts[1:]))) for picture in pictures]
    else:
        test = set(shuffled(len(pictures), seed)[: max(1, round(TEST_SHARE * len(pictures)))])
        inside = [("test" if index in test else "train", picture) for index, picture in enumerate(pictures)]
    return {split: [picture for top, picture in inside if top == split] for split in ("train", "test")}


def _examples(pictures: list[Picture], labels: tuple[str, ...], size: tuple[int, int], channels: int) -> Made:
    numbers = {label: number for number, label in enumerate(labels)}
    keys = _keys([picture.path for picture in pictures])

    def make(index: int) -> Example:
        picture = pictures[index]
        try:
            pixels = np.asarray(fitted(picture.file.read_bytes(), size, channels))
        except OSError as error:
            raise InputError(f"{picture.where}: cannot be read ({error.strerror}): check its owner and mode") from None
        except InputError as error:
            remedy = "remove it, repair it, or pass over all such files with --broken skip"
            raise InputError(f"{picture.where}: {error}: {remedy}") from None
        array = pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return keys[index], array, numbers[picture.path.parts[0]] if labels else -1

    return Made(length=len(pictures), make=make)


def _keys(paths: list[PurePosixPath]) -> list[str]:
    """WebDataset keys like the paths: no dots (they start a suffix), no leading __ (metadata), printable, each once."""
    keys: dict[str, None] = {}
    for path in paths:
        shown = _printable(str(path.with_suffix("")))
        base = "/".join(part.replace(".", "_").lstrip("_") or "_" for part in shown.split("/"))
        variants = chain([base], (f"{base}_{number}" for number in count(2)))
        keys[next(key for key in variants if key not in keys)] = None
    return list(keys)
