"""Commands that make and check data sets: pack, index, verify."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from pipeline.cli.output import Json, lines_to_stderr, print_json
from pipeline.errors import InputError
from pipeline.terminal import busy

if TYPE_CHECKING:
    from pipeline.data.format.manifest import Manifest


def pack(
    source: Positional[str],
    /,
    *,
    to: str,
    root: Path | None = None,
    size: str | None = None,
    channels: Literal[1, 3] = 3,
    broken: Literal["error", "skip"] = "error",
    shards: int | None = None,
    encoding: Literal["png", "jpg", "webp", "npy"] = "png",
    train: int | None = None,
    without: tuple[str, ...] = (),
    seed: int = 0,
    force: bool = False,
) -> None:
    """Pack a data set into WebDataset shards with an index.json.

    Args:
        source: mnist, fashion_mnist, cifar10, digits, toy2d:<name> or folder; mnist:100 keeps 100 training images.
        to: Folder or s3://bucket/prefix to write.
        root: Files to use instead of fetching them; for folder, the tree of images (sub-folders are labels).
        size: For folder: pixels a side (64) or height x width (48x64); pictures are cropped to that shape, resized.
        channels: For folder: 3 colour, 1 grey.
        broken: For folder: whether a file that is no picture ends it, or is passed over with a warning.
        shards: Shards a split; default 16, more for large data.
        encoding: How images are stored: png and webp keep every bit, jpg is smaller, npy is read fastest.
        train: Keep only so many training examples, drawn by the seed; the test split stays whole.
        without: Labels to leave out of the training split.
        seed: Of the order in which samples are dealt to shards, and of what is drawn.
        force: Replace a data set that is there.
    """
    from pipeline.data.format import writer
    from pipeline.data.sources.catalog import load
    from pipeline.data.sources.source import subset
    from pipeline.evaluate import NEIGHBOURS

    with busy(f"reading {source}", shown=broken == "error"):  # else it has a bar of its own
        loaded = load(source, root=root, size=size, channels=channels, seed=seed, skip=broken == "skip")
    if train is not None or without:
        loaded = subset(loaded, train=train, without=without, seed=seed)
    manifest, written = writer.pack(loaded, to, shards=shards, encoding=encoding, seed=seed, force=force)
    print(f"{_contents(to, manifest)}{'' if written else ' (already there)'}")
    if (tests := manifest.split("test").samples) <= NEIGHBOURS:
        print(f"note: too few test examples to evaluate a network on: {tests}, and more than {NEIGHBOURS} are needed")


def index(
    path: Positional[str],
    /,
    *,
    to: str = "",
    train: str | None = None,
    test: str | None = None,
    label: str = "",
    labels: Path | None = None,
    name: str | None = None,
    sample_check: int | None = None,
    keep_broken: bool = False,
    force: bool = False,
) -> None:
    """Make the index.json and page tables of WebDataset tars that others wrote; reads every byte, changes no tar.

    Interrupted, it goes on with the tars that it has not read yet.

    Args:
        path: Folder, s3://bucket/prefix or a pattern such as 's3://bucket/prefix/{00000..01023}.tar' of the tars. Their
            samples are pictures of any size, or points of one.
        to: Folder or s3://bucket/prefix to write to, for --data.index; default: beside the tars.
        train: Which of them are for training, as a pattern like 'imagenet-train-*.tar'; default: those not for testing.
        test: Which are for testing; default: those with test or val in their names.
        label: Where labels are: json:FIELD of the .json, or name:REGEX of the key; default: the number in .cls.
        labels: File with a label name a line; default: the numbers or texts that are found.
        name: Of the data set; default: the last part of the path.
        sample_check: So many pictures of each tar are decoded, of others the header is read; default: all are decoded.
        keep_broken: Of samples that cannot be decoded only warn; train with --data.broken=skip.
        force: Replace an index.json that is there.
    """
    from pipeline.data.format.indexing import index as read_all

    try:
        names = tuple(labels.read_text().splitlines()) if labels else ()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels {labels}: {error}") from None
    manifest = read_all(
        path,
        to=to,
        train=train,
        test=test,
        label=label,
        labels=names,
        name=name,
        sample_check=sample_check,
        keep_broken=keep_broken,
        force=force,
    )
    print(_contents(to or path, manifest))
    if broken := sum(map(len, manifest.broken.values())):
        print(f"note: {broken} samples cannot be decoded, which index.json records: train with --data.broken=skip")
    if "test" not in manifest.splits:
        print(
            "note: no tar is for testing, so none to measure a network on: test or val in a name, or --test, says which"
        )


def _contents(path: str, manifest: "Manifest") -> str:
    counts = (f"{split.samples} {name} in {len(split.shards)} shards" for name, split in manifest.splits.items())
    sizes = "x".join(map(str, manifest.shape)) if all(manifest.shape) else f"{manifest.shape[0]} x any size"
    return f"{path}: {manifest.name} {sizes}, {', '.join(counts)}"


def verify(path: Positional[str], /, *, index: str = "", json: Json = False) -> None:
    """Check a data set against its index.json: sizes, hashes, page tables, tar structure, pixels, labels, keys.

    Samples that cannot be decoded and were indexed so (naign index --keep-broken) are named, and are no problem.

    Args:
        path: Folder or s3://bucket/prefix of shards.
        index: Folder or s3://bucket/prefix of its index.json and page tables; default: beside the shards.
    """
    from pipeline.data.format.audit import PROBLEMS, Problems
    from pipeline.data.format.audit import verify as read_all

    document: dict[str, Any] = {"path": path, "sound": True, "problems": []}
    document |= dict.fromkeys(("samples", "shards", "bytes", "broken"))
    try:
        with lines_to_stderr(json):
            report = read_all(path, index=index)
    except Problems as error:
        if json:
            print_json(document | {"sound": False, "problems": error.problems})
        raise
    if json:
        broken = [{"shard": shard, "key": key} for shard, key in report.broken]
        print_json(document | report._asdict() | {"broken": broken})
        return
    print(f"{path}: sound, {report.samples} samples in {report.shards} shards, {report.bytes / 1e6:.1f} MB")
    if report.broken:
        shown = ", ".join(f"{shard} {key}" for shard, key in report.broken[:PROBLEMS])
        more = ", ..." if len(report.broken) > PROBLEMS else ""
        print(f"of them {len(report.broken)} are known to be broken: {shown}{more}")
