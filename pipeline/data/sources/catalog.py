"""The sources by name: what `naign pack` can pack. Other packages add theirs as entry points of group naign.sources."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.order import check_seed, shuffled
from pipeline.data.sources import published, toys
from pipeline.data.sources.folder import from_tree
from pipeline.data.sources.source import Source, labelled, subset
from pipeline.errors import InputError, require
from pipeline.settings.registry import known, lookup


def _parquet(_: str, root: Path, size: str, channels: int, seed: int, skip: bool, image: str, label: str) -> Source:
    try:
        from pipeline.data.sources.parquet import from_tables
    except ImportError as error:
        raise InputError(f"parquet needs pyarrow ({error}): pip install pyarrow") from None
    return from_tables(root, size=size, channels=channels, seed=seed, skip=skip, image=image, label=label)


SOURCES: dict[str, Callable[..., Source]] = {
    "mnist": lambda _, root: published.idx("mnist", root),
    "fashion_mnist": lambda _, root: published.idx("fashion_mnist", root),
    "cifar10": lambda _, root: published.cifar10(root),
    "digits": lambda _: digits(),
    "toy2d:<name>": lambda name, seed: toys.toy2d(name, seed=seed),
    "folder": lambda _, root, size, channels, seed, skip: from_tree(
        "folder", root, size=size, channels=channels, seed=seed, skip=skip
    ),
    "parquet": _parquet,
}
"""By `name` or, with an argument, `name:<name>`: functions of the argument (else '') and of options of `load`."""

GROUP = "naign.sources"
TREES = ("folder", "parquet")  # sources of the user's own pictures


def load(
    name: str,
    *,
    root: Path | None = None,  # files to use instead of fetching them; of `folder` and `parquet`, the pictures
    size: str | int | None = None,  # this, channels and skip: for these two, as `from_tree` takes them
    channels: int = 3,
    seed: int = 0,  # of what is drawn: the points of toy2d, the test split of pictures
    skip: bool = False,
    image: str = "",  # this and label: for `parquet`, as `from_tables` takes them
    label: str = "",
) -> Source:
    """The named source; of one such as mnist:100, that many of its training examples, drawn by the seed. InputError for
    an unknown name, missing files, or an option that it does not take; Unavailable where files cannot be fetched.
    """
    check_seed(seed)
    options: dict[str, Any] = {"root": root, "size": size, "channels": channels, "seed": seed, "skip": skip}
    options |= {"image": image, "label": label}
    base, _, argument = name.partition(":")
    choices, key = known(SOURCES, GROUP), f"{base}:<name>"
    if key not in choices and argument.isdecimal() and len(argument) < 10:
        return subset(load(base, **options), train=int(argument), seed=seed)
    tree = {name: f"for a tree of pictures: folder --root {name} --size 64"} if Path(name).is_dir() else {}
    chosen = key if argument and key in choices else name
    build = lookup("the data set to pack", chosen, SOURCES, GROUP, remedies=tree)
    takes, given = signature(build).parameters, size is not None or channels != 3
    whole = f"{name} is packed whole or not at all: --broken is for folder and parquet"
    require(
        ("size" in takes or not given, f"{name} has its own size and channels: --size and --channels are for pictures"),
        ("skip" in takes or not skip, whole),
        ("label" in takes or not (image or label), f"{name} has no columns: --image and --label are for parquet"),
        ("root" in takes or root is None, f"{name} needs no files: leave out --root"),
        (name not in TREES or root and size, f"{name} needs pictures and their size: add --root FOLDER --size 64"),
    )
    return build(argument, **{key: value for key, value in options.items() if key in takes})


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
