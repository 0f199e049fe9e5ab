"""The sources by name: what `naign pack` can pack. Other packages add theirs as entry points of group naign.sources."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path

import numpy as np

from pipeline.data.order import check_seed, shuffled
from pipeline.data.sources import published, toys
from pipeline.data.sources.folder import from_tree
from pipeline.data.sources.source import Source, labelled, subset
from pipeline.errors import InputError, require
from pipeline.settings.registry import known, lookup


def _folder(_: str, *, root: Path | None, size: str | int | None, channels: int, seed: int, skip: bool) -> Source:
    if root is None or size is None:
        raise InputError("folder needs the tree of pictures and their size: add --root FOLDER --size 64")
    return from_tree("folder", root, size=size, channels=channels, seed=seed, skip=skip)


SOURCES: dict[str, Callable[..., Source]] = {
    "mnist": lambda _, root: published.idx("mnist", root),
    "fashion_mnist": lambda _, root: published.idx("fashion_mnist", root),
    "cifar10": lambda _, root: published.cifar10(root),
    "digits": lambda _: digits(),
    "toy2d:<name>": lambda name, seed: toys.toy2d(name, seed=seed),
    "folder": _folder,
}
"""By `name` or, with an argument, `name:<name>`: functions of the argument (else '') and of options of `load`."""

GROUP = "naign.sources"


def load(
    name: str,
    *,
    root: Path | None = None,  # files to use instead of fetching them; for `folder`, the tree of pictures
    size: str | int | None = None,  # this, channels and skip: for `folder`, as `from_tree` takes them
    channels: int = 3,
    seed: int = 0,  # of what is drawn: the points of toy2d, the test split of `folder`
    skip: bool = False,
) -> Source:
    """The named source; of one such as mnist:100, that many of its training examples, drawn by the seed. InputError for
    an unknown name, missing files, or an option that it does not take; Unavailable where files cannot be fetched.
    """
    check_seed(seed)
    base, _, argument = name.partition(":")
    choices, key = known(SOURCES, GROUP), f"{base}:<name>"
    if key not in choices and argument.isdecimal() and len(argument) < 10:
        whole = load(base, root=root, size=size, channels=channels, seed=seed, skip=skip)
        return subset(whole, train=int(argument), seed=seed)
    tree = {name: f"for a tree of pictures: folder --root {name} --size 64"} if Path(name).is_dir() else {}
    chosen = key if argument and key in choices else name
    build = lookup("the data set to pack", chosen, SOURCES, GROUP, remedies=tree)
    takes = signature(build).parameters
    given = {"root": root, "size": size, "channels": channels, "seed": seed, "skip": skip}
    if "size" not in takes and (size is not None or channels != 3):
        raise InputError(f"{name} has its own size and channels: --size and --channels are for folder only")
    if "skip" not in takes and skip:
        raise InputError(f"{name} is packed whole or not at all: --broken is for folder only")
    require(("root" in takes or root is None, f"{name} needs no files: leave out --root"))
    return build(argument, **{key: value for key, value in given.items() if key in takes})


def digits() -> Source:
    """scikit-learn's 1,797 digits of 8x8, values 0 to 16 spread over 0 to 255; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order, count = shuffled(len(images), seed=0), len(images) // 5
    splits = {
        split: labelled([f"digit-{row:04d}" for row in rows], images[rows], labels[rows])
        for split, rows in {"train": order[count:], "test": order[:count]}.items()
    }
    return Source(name="digits", kind="image", shape=(1, 8, 8), labels=tuple("0123456789"), splits=splits)
