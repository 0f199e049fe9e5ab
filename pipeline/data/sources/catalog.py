"""The sources by name: what `naign pack` can pack. Other packages add theirs as entry points of group naign.sources."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.order import check_seed, shuffled
from pipeline.data.sources import published, toys
from pipeline.data.sources.folder import from_tree
from pipeline.data.sources.source import Source, labelled, subset
from pipeline.errors import InputError
from pipeline.settings.registry import known, lookup


@dataclass(kw_only=True, slots=True, frozen=True)
class Seeded:
    """Settings of a source that needs no files."""

    seed: int = 0  # of what is drawn


@dataclass(kw_only=True, slots=True, frozen=True)
class Published(Seeded):
    """Settings of a source that is fetched from where it is published."""

    root: Path | None = None  # files to use instead of fetching them


@dataclass(kw_only=True, slots=True, frozen=True)
class Tree(Seeded):
    """Settings of a tree of pictures."""

    root: Path | None = None
    size: str | int | None = None  # pixels a side, or height x width
    channels: int = 3  # 3 colour or 1 grey
    skip: bool = False  # pass over files that are no picture


def _folder(_: str, settings: Tree) -> Source:
    if settings.root is None or settings.size is None:
        raise InputError("folder needs the tree of pictures and their size: add --root FOLDER --size 64")
    size, channels = settings.size, settings.channels
    return from_tree("folder", settings.root, size=size, channels=channels, seed=settings.seed, skip=settings.skip)


Entry = tuple[type[Any], Callable[[str, Any], Source]]
"""The settings that a source takes, and how it is made of its argument ('' or what follows a colon) and these."""

SOURCES: dict[str, Entry] = {
    "mnist": (Published, lambda _, settings: published.idx("mnist", settings.root)),
    "fashion_mnist": (Published, lambda _, settings: published.idx("fashion_mnist", settings.root)),
    "cifar10": (Published, lambda _, settings: published.cifar10(settings.root)),
    "digits": (Seeded, lambda _, settings: digits()),
    "toy2d:<name>": (Seeded, lambda name, settings: toys.toy2d(name, seed=settings.seed)),
    "folder": (Tree, _folder),
}
"""`name` or, of those that take an argument, `name:<name>`."""

GROUP = "naign.sources"


def load(
    name: str,  # one of SOURCES
    *,
    root: Path | None = None,  # files to use instead of fetching them; for `folder`, the tree of pictures
    size: str | int | None = None,  # pixels a side or height x width, for `folder`
    channels: int = 3,  # 3 colour or 1 grey, for `folder`
    seed: int = 0,  # of what is drawn: the points of toy2d, the test split of `folder`
    skip: bool = False,  # pass over files that are no picture, for `folder`
) -> Source:
    """The named source; of one such as mnist:100, that many of its training examples, drawn by the seed.

    Raises InputError for an unknown name, missing files, or an option that it does not take; Unavailable where files
    cannot be fetched for now.
    """
    check_seed(seed)
    base, _, argument = name.partition(":")
    choices, key = known(SOURCES, GROUP), f"{base}:<name>"
    if key not in choices and argument.isdecimal() and len(argument) < 10:
        whole = load(base, root=root, size=size, channels=channels, seed=seed, skip=skip)
        return subset(whole, train=int(argument), seed=seed)
    settings, build = lookup("the data set to pack", key if argument and key in choices else name, SOURCES, GROUP)
    takes = {field.name for field in fields(settings)}
    given = {"root": root, "size": size, "channels": channels, "seed": seed, "skip": skip}
    if "size" not in takes and (size is not None or channels != 3):
        raise InputError(f"{name} has its own size and channels: --size and --channels are for folder only")
    if "skip" not in takes and skip:
        raise InputError(f"{name} is packed whole or not at all: --broken is for folder only")
    if "root" not in takes and root is not None:
        raise InputError(f"{name} needs no files: leave out --root")
    return build(argument, settings(**{key: value for key, value in given.items() if key in takes}))


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8, values 0 to 16 spread over 0 to 255; a fixed fifth is the test.

    Needs no network.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order, count = shuffled(len(images), seed=0), len(images) // 5
    rows = {"train": order[count:], "test": order[:count]}
    splits = {split: labelled("digit-{:04d}", images, labels, chosen) for split, chosen in rows.items()}
    return Source(name="digits", kind="image", shape=(1, 8, 8), labels=tuple("0123456789"), splits=splits)
