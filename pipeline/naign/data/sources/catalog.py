"""The sources by name: what `naign pack` can pack. Other packages add theirs as entry points of group naign.sources."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from naign.data.order import check_seed, shuffled
from naign.data.sources import published, toys
from naign.data.sources.folder import from_tree
from naign.data.sources.source import Source, labelled, subset
from naign.errors import InputError
from naign.settings.registry import known, lookup

GROUP = "naign.sources"
DEFAULTS: dict[str, Any] = {"root": None, "size": None, "channels": 3, "skip": False, "image": "", "label": ""}
TREES = ("folder", "parquet")  # sources of the user's own pictures


def load(name: str, *, seed: int = 0, **given: Any) -> Source:
    """The named source; of one such as mnist:100, that many of its training examples, drawn by the seed, as are the
    points of toy2d and the test split of pictures. `given` are of DEFAULTS: root, files to use instead of fetching
    them; for `folder` and `parquet`, the pictures, and the others as `from_tree` and `from_tables` take them.

    Raises InputError for an unknown name, missing files, or an unfit option; Unavailable where files cannot be fetched.
    """
    check_seed(seed)
    options = DEFAULTS | given | {"seed": seed}
    base, _, argument = name.partition(":")
    names = known(SOURCES, GROUP)
    with_argument = f"{base}:<name>"
    if with_argument not in names and argument.isdecimal() and len(argument) < 10:
        return subset(load(base, seed=seed, **given), int(argument), seed=seed)
    root = str(options["root"])
    if ":/" in root and not Path(root).exists():
        local = "download it first, or index tars in the bucket with `naign index`"
        raise InputError(f"--root {root.replace(':/', '://', 1)}: what is packed is a local folder: {local}")
    remedies = {}
    if Path(name).is_dir():
        remedies[name] = f"for a tree of pictures: folder --root {name} --size 64"
    key = with_argument if argument and with_argument in names else name
    build = lookup("the data set to pack", key, SOURCES, GROUP, remedies=remedies)
    taken = signature(build).parameters
    for option, default in DEFAULTS.items():
        if option not in taken and options[option] != default:
            flag = "broken" if option == "skip" else option
            raise InputError(f"{name} does not take --{flag}: leave it out")
    if name in TREES and not (options["root"] and options["size"]):
        raise InputError(f"{name} needs pictures and their size: add --root FOLDER --size 64")
    return build(argument, **{option: value for option, value in options.items() if option in taken})


def folder(
    _: str,
    root: Path,
    size: str,
    channels: int,
    seed: int,
    skip: bool,
) -> Source:
    return from_tree(root, size=size, channels=channels, seed=seed, skip=skip)


def parquet(
    _: str,
    root: Path,
    size: str,
    channels: int,
    seed: int,
    skip: bool,
    image: str,
    label: str,
) -> Source:
    try:
        from naign.data.sources.parquet import from_tables
    except ImportError as error:
        raise InputError(f"parquet needs pyarrow ({error}): pip install pyarrow") from None
    return from_tables(
        root,
        size=size,
        channels=channels,
        seed=seed,
        skip=skip,
        image=image,
        label=label,
    )


def digits(_: str) -> Source:
    """scikit-learn's 1,797 digits of 8x8, values 0 to 16 spread over 0 to 255; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = shuffled(len(images), seed=0)
    count = len(images) // 5
    splits = {}
    for split, rows in (("train", order[count:]), ("test", order[:count])):
        splits[split] = labelled([f"digit-{row:04d}" for row in rows], images[rows], labels[rows])
    return Source(
        name="digits",
        kind="image",
        shape=(1, 8, 8),
        labels=tuple("0123456789"),
        splits=splits,
    )


SOURCES: dict[str, Callable[..., Source]] = {
    "mnist": lambda _, root: published.idx("mnist", root),
    "fashion_mnist": lambda _, root: published.idx("fashion_mnist", root),
    "cifar10": lambda _, root: published.cifar10(root),
    "digits": digits,
    "toy2d:<name>": toys.toy2d,
    "folder": folder,
    "parquet": parquet,
}
"""By `name` or, with an argument, `name:<name>`: functions of the argument (else '') and of options of `load`."""
