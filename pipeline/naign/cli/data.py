"""Commands that make and check data sets: pack, index, verify."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from naign.data.format import IndexOptions
from naign.errors import require
from naign.terminal import busy

if TYPE_CHECKING:
    from naign.data.format.manifest import Manifest


def pack(
    source: Positional[str],
    /,
    *,
    to: str,
    root: Path | None = None,
    size: str | None = None,
    channels: Literal[1, 3] = 3,
    shards: int | None = None,
    encoding: Literal["png", "jpg", "npy"] = "png",
    seed: int = 0,
    force: bool = False,
) -> None:
    """Pack a data set into WebDataset shards with an index.json.

    Args:
        source: mnist, fashion_mnist, cifar10, digits, toy2d:gaussians, folder or lsun; mnist:100 keeps 100 of mnist.
        to: Folder, or s3://bucket/prefix (gs://, az://) to write.
        root: Files to use instead of fetching them; for folder, the tree of images (sub-folders are labels); for lsun,
            the LMDB database of a category.
        size: For folder and lsun: pixels a side (64) or height x width (48x64); pictures are cropped to it, resized.
        channels: For folder: 3 colour, 1 grey.
        shards: Shards a split; default 16, more for large data.
        encoding: How images are stored: png keeps every bit, jpg is smaller, npy is read fastest.
        seed: Seed of the order of samples in shards, and of the choice of training images.
        force: Replace an existing data set, which is deleted once all that takes its place was read.
    """
    from naign.data.format import writer
    from naign.data.sources.catalog import load

    itself = root is not None and root.resolve() == Path(to).resolve()
    require((not itself, f"--to {to} is --root: give another folder for the shards"))
    with busy(f"reading {source}"):
        loaded = load(
            source,
            root=root,
            size=size,
            channels=channels,
            seed=seed,
        )
    manifest, written = writer.pack(
        loaded,
        to,
        shards=shards,
        encoding=encoding,
        seed=seed,
        force=force,
    )
    _print_contents(to, manifest, "" if written else " (already there)")


def index(
    path: Positional[str],
    /,
    *,
    options: Annotated[IndexOptions, tyro.conf.arg(name="")],
) -> None:
    """Index existing WebDataset tars: write index.json and page tables, without changing a tar.

    Every byte is read.

    Args:
        path: Folder, s3://bucket/prefix or a pattern such as 's3://bucket/prefix/{00000..01023}.tar' of the tars.
            Samples are pictures of any size, or points of one length.
    """
    from naign.data.format.indexing import index as read_all

    checked = options.sample_check
    require((checked is None or checked >= 0, f"--sample-check is {checked}: it must be at least 0"))
    manifest = read_all(path, **vars(options))
    _print_contents(options.to or path, manifest)
    broken = sum(map(len, manifest.broken.values()))
    if broken:
        print(f"note: {broken} samples cannot be decoded, which index.json records: train with --data.broken=skip")
    if "test" not in manifest.splits:
        print("note: no test split: put 'test' or 'val' in names of tars, or pass --test PATTERN")


def _print_contents(path: str, manifest: "Manifest", note: str = "") -> None:
    counts = [f"{split.samples} {name} in {len(split.shards)} shards" for name, split in manifest.splits.items()]
    sizes = "x".join(map(str, manifest.shape))
    if 0 in manifest.shape:
        sizes = f"{manifest.shape[0]} x any size"
    print(f"{path}: {manifest.name} {sizes}, {', '.join(counts)}{note}")


def verify(path: Positional[str], /, *, index: str = "") -> None:
    """Read all samples of a data set as training does: sizes, hashes, page tables, pixels, labels.

    Samples that naign index --keep-broken recorded as broken are listed, and count as no problem.

    Args:
        path: Folder or s3://bucket/prefix of shards.
        index: Folder or s3://bucket/prefix of its index.json and page tables; default: beside the shards.
    """
    from naign.data.format.audit import verify as read_all

    count, broken = read_all(path, index=index)
    print(f"{path}: sound, {count} samples")
    if broken:
        print(f"of them {len(broken)} are known to be broken, as {broken[0]}")
