"""The sources by name: what `naign pack` can pack. Other packages add theirs as entry points of group naign.sources."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from naign.data.order import check_seed, shuffled
from naign.data.sources import published, toys
from naign.data.sources.folder import from_tree
from naign.data.sources.lsun import lsun
from naign.data.sources.source import Source, labelled, subset
from naign.errors import require
from naign.settings.registry import known, lookup

GROUP = "naign.sources"
DEFAULTS: dict[str, Any] = {
    "root": None,
    "size": None,
    "channels": 3,
}


def load(name: str, *, seed: int = 0, **given: Any) -> Source:
    """The named source; of one such as mnist:100, that many of its training examples, drawn by the seed, as are the
    points of toy2d and the test split of pictures. `given` are of DEFAULTS: root, files to use instead of fetching
    them; for `folder`, the pictures, and the others as `from_tree` takes them.

    Raises InputError for an unknown name, missing files, or an unfit option; Unavailable where files cannot be fetched.
    """
    check_seed(seed)
    base, _, argument = name.partition(":")
    key = f"{base}:<name>"
    if not argument or key not in known(SOURCES, GROUP):
        key = name
        if argument.isdecimal() and len(argument) < 10:
            return subset(load(base, seed=seed, **given), int(argument), seed=seed)
    build = lookup("the data set to pack", key, SOURCES, GROUP)
    taken = signature(build).parameters
    options = DEFAULTS | given | {"seed": seed}
    for option, value in DEFAULTS.items():
        require((option in taken or options[option] == value, f"{name} does not take --{option}: leave it out"))
    return build(argument, **{option: value for option, value in options.items() if option in taken})


def digits(_: str) -> Source:
    """scikit-learn's 1,797 digits of 8x8, values 0 to 16 spread over 0 to 255; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = shuffled(len(images), seed=0)
    count = len(images) // 5
    splits = {}
    for split, rows in (("train", order[count:]), ("test", order[:count])):
        keys = [f"digit-{row:04d}" for row in rows]
        splits[split] = labelled(keys, images[rows], labels[rows])
    return Source(
        name="digits",
        shape=(1, 8, 8),
        labels=tuple("0123456789"),
        splits=splits,
    )


SOURCES: dict[str, Callable[..., Source]] = {
    "mnist": partial(published.idx, "mnist"),
    "fashion_mnist": partial(published.idx, "fashion_mnist"),
    "cifar10": published.cifar10,
    "digits": digits,
    "toy2d:<name>": toys.toy2d,
    "folder": from_tree,
    "lsun": lsun,
}
"""By `name` or, with an argument, `name:<name>`: functions of the argument (else '') and of options of `load`."""
