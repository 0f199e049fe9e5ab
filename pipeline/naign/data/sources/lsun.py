"""A category of LSUN (arXiv 1506.03365), from the LMDB database that its authors publish."""

from pathlib import Path

import numpy as np

from naign.data.resize import Resize, channels, parse_size, resized
from naign.data.sources.folder import choose_tests
from naign.data.sources.source import BrokenPicture, Example, Made, Source
from naign.errors import InputError, one_line, require


def lsun(
    _: str,
    root: Path | None,
    size: str | int | None,
    seed: int,
) -> Source:
    """The pictures of a database such as church_outdoor_train_lmdb at `root`, cropped to `size` as those of a folder.

    A tenth, drawn by the seed, is the test split; there are no labels. Raises InputError for what is not a database.
    """
    if not (root and size):
        raise InputError("lsun needs a database and a size: add --root church_outdoor_train_lmdb --size 64")
    height, width = parse_size(str(size), "--size")
    resize = Resize(height=height, width=width)
    try:
        import lmdb
    except ImportError as error:
        raise InputError(f"lsun needs lmdb ({error}): pip install lmdb") from None
    try:
        database = lmdb.open(str(root), readonly=True, lock=False, readahead=False)
        whole = (database.info()["last_pgno"] + 1) * database.stat()["psize"]  # reading past the end would be SIGBUS
        size_of = (root / "data.mdb").stat().st_size
        require((size_of >= whole, f"{root}/data.mdb has {size_of:,} of {whole:,} bytes: unpack the archive again"))
        with database.begin() as view:
            keys = list(view.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise InputError(f"{root} is not an LMDB database ({one_line(error)}): give the folder of data.mdb") from None
    require((len(keys) > 1, f"{root}: {len(keys)} pictures, and at least 2 are needed: check the path"))

    def examples(rows: list[int]) -> Made:
        def make(index: int) -> Example:
            key = keys[rows[index]]
            name = key.decode() if key.isalnum() else key.hex()  # a hash in hexadecimal, as published
            with database.begin() as view:
                content = view.get(key, b"")
            try:
                pixels = resized(content, resize)
            except InputError as error:
                raise BrokenPicture(f"{root}, {name}: {error}") from None
            return name, np.ascontiguousarray(channels(pixels, 3)), -1

        return Made(length=len(rows), make=make)

    tests = sorted(choose_tests(len(keys), seed))
    train = sorted(set(range(len(keys))).difference(tests))
    return Source(
        name="lsun",
        shape=(3, height, width),
        labels=(),
        splits={"train": examples(train), "test": examples(tests)},
    )
