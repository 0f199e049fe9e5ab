"""Verification of a data set: every sample is read as training reads it."""

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.order import leading
from naign.data.reader import Reader
from naign.errors import InputError
from naign.terminal import counted


def verify(path: str, *, index: str = "") -> tuple[int, list[str]]:
    """Read every sample of a data set: sizes, hashes, page tables, pixels, shapes, labels. Returns their number, and
    shard and key of those that index.json says are broken, and are. InputError names the first other problem.
    """
    manifest = Manifest.load(index or path)
    config = DataConfig(path=path, index=index)
    count = 0
    broken = []
    for name, split in manifest.splits.items():
        reader = Reader(config, manifest, name)
        pieces = leading(split.sizes, split.samples)
        for raw in counted(
            f"verify {name}",
            reader.raw(pieces),
            total=split.samples,
            unit="sample",
        ):
            count += 1
            try:
                reader.row(raw)
            except InputError:
                shard = split.shards[raw.piece.shard].name
                key = raw.sample["__key__"]
                if key not in manifest.broken.get(shard, ()):
                    raise
                broken.append(f"{shard} {key}")
    return count, broken
