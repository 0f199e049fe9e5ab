"""Any tree of pictures as a source: each is turned upright, cropped to one shape, resized, and labelled."""

import logging
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from naign.data.order import shuffled
from naign.data.resize import Resize, parse_size, resized
from naign.data.resize import channels as to_channels
from naign.data.sources.source import BrokenPicture, Example, Made, Source
from naign.errors import InputError, printable
from naign.storage.local import walk

log = logging.getLogger(__name__)

TEST_SHARE = 0.1  # of the pictures, where there is no folder test/
LONGEST = 4096  # characters of a path
WINDOWS = ("Thumbs.db", "desktop.ini")  # files that Windows leaves in folders of pictures


class Picture(NamedTuple):
    """One file of the tree."""

    file: Path
    path: PurePosixPath  # relative to the tree, or to its train/ or test/

    @property
    def top(self) -> str:
        """The name of its first folder, or ""."""
        if len(self.path.parts) > 1:
            return self.path.parts[0]
        return ""


def from_tree(
    _: str,
    root: Path | None,
    size: str | int | None,
    channels: int,
    seed: int,
) -> Source:
    """The pictures under `root`, the name of a picture's first folder being its label (none if any lies outside), with
    `size` pixels a side, or height x width as 48x64, and 3 channels (colour) or 1 (grey).

    The splits are the top folders train/ and test/ where both are there, else a tenth, drawn by the seed, is the test
    split. Names that start with a dot and WINDOWS are passed over, and files of no picture are left out when they are
    packed. Raises InputError, naming the file, for broken links and folders that cannot be read.
    """
    if root is None or size is None:
        raise InputError("folder needs pictures and their size: add --root FOLDER --size 64")
    if channels not in (1, 3):
        raise InputError(f"no {channels} channels: use --channels 1 or 3")
    height, width = parse_size(str(size), "--size")
    resize = Resize(height=height, width=width)
    pictures = _find_pictures(root)
    if len(pictures) < 2:
        raise InputError(f"{root}: {len(pictures)} pictures, and at least 2 are needed: check the path")
    splits = _split(pictures, root, seed)
    names = {picture.top for split in splits.values() for picture in split}
    labels = sorted(names)
    if "" in names:
        labels = []
        if len(names) > 1:
            log.warning("no labels: some pictures lie in folders, others in none; move these into one for labels")
    made = {split: _examples(group, labels, resize, channels) for split, group in splits.items()}
    return Source(
        name="folder",
        shape=(channels, height, width),
        labels=tuple(labels),
        splits=made,
    )


def _examples(
    pictures: list[Picture],
    labels: list[str],
    resize: Resize,
    channels: int,
) -> Made:
    """The examples of a split: of each upright picture the largest central window, resized."""
    keys = _keys(pictures)

    def make(index: int) -> Example:
        picture = pictures[index]
        where = printable(str(picture.file), LONGEST)
        label = labels.index(picture.top) if labels else -1
        try:
            pixels = resized(picture.file.read_bytes(), resize)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror}): check its owner and mode") from None
        except InputError as error:
            raise BrokenPicture(f"{where}: {error}") from None
        return keys[index], np.ascontiguousarray(to_channels(pixels, channels)), label

    return Made(length=len(keys), make=make)


def _find_pictures(root: Path) -> list[Picture]:
    """The files of the tree, in order. Links to folders are followed."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: give a folder of pictures with --root; unpack an archive first")

    pictures = []
    places = set[Path]()
    for name, inner, files in walk(root, links=True):
        folder = Path(name)
        inner[:] = [name for name in inner if not name.startswith(".")]
        place = folder.resolve()
        if place in places:
            raise InputError(f"{folder}: a link that leads to a folder of the tree: remove it")
        places.add(place)
        for file in map(folder.joinpath, files):
            if file.name.startswith((".", *WINDOWS)):
                continue
            if not file.is_file():
                raise InputError(f"{file}: neither file nor folder, or a link that leads to none: remove it")
            pictures.append(Picture(file, PurePosixPath(file.relative_to(root))))
    return sorted(pictures)


def _split(pictures: list[Picture], root: Path, seed: int) -> dict[str, list[Picture]]:
    """The pictures of each split, in order."""
    splits: dict[str, list[Picture]] = {"train": [], "test": []}
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        tests = set(choose_tests(len(pictures), seed))
        for index, picture in enumerate(pictures):
            split = "test" if index in tests else "train"
            splits[split].append(picture)
        return splits
    for picture in pictures:
        if picture.top not in splits:
            where = printable(str(picture.file), LONGEST)
            raise InputError(f"{where}: lies beside train/ and test/: move it into one of them")
        path = picture.path.relative_to(picture.top)
        splits[picture.top].append(Picture(picture.file, path))
    for split, group in splits.items():
        if not group:
            raise InputError(f"{root}: {split}/ holds no pictures: put some there, or remove it")
    return splits


def choose_tests(count: int, seed: int) -> list[int]:
    """The numbers of the pictures, of `count`, that are the test split where a source has none."""
    few = max(1, round(TEST_SHARE * count))
    return shuffled(count, seed)[:few]


def _keys(pictures: list[Picture]) -> list[str]:
    """WebDataset keys like the paths: no dots (they start a suffix), no leading __ (metadata), printable, each once."""
    keys: dict[str, None] = {}
    for picture in pictures:
        shown = printable(str(picture.path.with_suffix("")), LONGEST)
        parts = [part.replace(".", "_").lstrip("_") or "_" for part in shown.split("/")]
        key = "/".join(parts)
        number = 1
        while key in keys:
            number += 1
            key = f"{'/'.join(parts)}_{number}"
        keys[key] = None
    return list(keys)
