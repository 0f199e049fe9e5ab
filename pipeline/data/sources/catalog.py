"""The sources by name: what `naign pack` can pack."""

from pathlib import Path

import numpy as np

from pipeline.data.order import check_seed
from pipeline.data.sources import published, toys
from pipeline.data.sources.folder import from_tree
from pipeline.data.sources.source import Example, Made, Source
from pipeline.errors import InputError

NAMES = ("mnist", "fashion_mnist", "cifar10", "digits", "toy2d:<name>", "folder")


def load(
    name: str,  # one of NAMES
    *,
    root: Path | None = None,  # files to use instead of fetching them; for `folder`, the tree of pictures
    size: int | None = None,  # pixels a side, for `folder`
    channels: int = 3,  # 3 colour or 1 grey, for `folder`
    seed: int = 0,  # of what is drawn: the points of toy2d, the test split of `folder`
) -> Source:
    """The named source. Raises InputError for an unknown name, missing files, or an option that it does not take."""
    check_seed(seed)
    if name != "folder" and (size is not None or channels != 3):
        raise InputError(f"{name} has its own size and channels: --size and --channels are for folder only")
    if root is not None and name not in ("mnist", "fashion_mnist", "cifar10", "folder"):
        raise InputError(f"{name} needs no files: leave out --root")
    match name:
        case "mnist":
            return published.mnist(root)
        case "fashion_mnist":
            return published.fashion_mnist(root)
        case "cifar10":
            return published.cifar10(root)
        case "digits":
            return digits()
        case "folder":
            if root is None or size is None:
                raise InputError("folder needs the tree of pictures and their size: add --root FOLDER --size 64")
            return from_tree("folder", root, size=size, channels=channels, seed=seed)
        case _ if name.startswith("toy2d:"):
            return toys.toy2d(name.removeprefix("toy2d:"), seed=seed)
    raise InputError(f"no data set {name!r}: choose one of {', '.join(NAMES)}")


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8, values 0 to 16 spread over 0 to 255; a fixed fifth is the test.

    Needs no network.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = np.argsort(np.random.Philox(key=0).random_raw(len(images)), kind="stable")
    count = len(images) // 5

    def made(rows: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Made:
        def make(index: int) -> Example:
            row = int(rows[index])
            return f"digit-{row:04d}", images[row], int(labels[row])

        return Made(length=len(rows), make=make)

    return Source(
        name="digits",
        kind="image",
        shape=(1, 8, 8),
        labels=tuple("0123456789"),
        splits={"train": made(order[count:]), "test": made(order[:count])},
    )
