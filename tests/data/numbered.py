"""Making small data sets, and damaging them."""

import io
import json
import tarfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from naign.data.dataset import DataConfig
from naign.data.format.pages import Pager, table_name
from naign.data.format.webdataset import scan
from naign.data.loader import Stream
from naign.data.sources.source import Made, Source
from naign.storage.local import LocalStore


def noise(seed, shape):
    """Pixels uint8 that cannot be compressed."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(train=23, test=5, shape=(1, 4, 4)):
    """Images whose first pixel is their index, labelled by its parity."""

    def split(name, length):
        def make(index):
            image = noise(index, shape)
            image.flat[0] = index
            return f"{name}-{index:03d}", image, index % 2

        return Made(length=length, make=make)

    return Source(
        name="numbered",
        kind="image",
        shape=shape,
        labels=("even", "odd"),
        splits={"train": split("train", train), "test": split("test", test)},
    )


def first(source, count):
    """A source with so many examples a split."""
    splits = {}
    for name, made in source.splits.items():
        splits[name] = Made(length=count, make=made.__getitem__)
    return replace(source, splits=splits)


def without_labels(members):
    """The members but those that hold labels."""
    return [member for member in members if not member[0].endswith(".cls")]


def replaced(suffix, data, number=0):
    """A change of `rewrite`: other bytes in the number-th member with that suffix."""

    def change(members):
        target = [name for name, _ in members if name.endswith(suffix)][number]
        return [(name, data if name == target else old) for name, old in members]

    return change


def build(count):
    """As another package's entry point brings it."""
    return numbered(train=int(count))


def add(tar, name, data):
    """A file in a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def rewrite(
    path,
    shard,
    change,
    *,
    damage=False,
):
    """Replace the members of a shard. Its hashes in the manifest follow, as if packed so, unless it is `damage`."""
    file = Path(path) / shard
    with tarfile.open(file) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(file, "w") as tar:
        for name, data in change(members):
            add(tar, name, data)
    if not damage:
        rehash(path, shard)


def rehash(path, shard):
    """Make the manifest agree with the bytes of a shard, but for its number of samples."""
    pager = Pager()
    assert list(scan(LocalStore(path), shard, pager))
    found, table = pager.shard(shard)
    (Path(path) / table_name(shard)).write_bytes(table)
    index = Path(path) / "index.json"
    content = json.loads(index.read_text())
    for split in content["splits"].values():
        for entry in split["shards"]:
            if entry["name"] == shard:
                entry |= {"bytes": found.bytes, "pages": found.pages}
    index.write_text(json.dumps(content))


def edit_index(path, **fields):
    """Replace top fields of index.json."""
    index = Path(path) / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **fields}))


@contextmanager
def streams_of(
    config,
    *,
    seed,
    each,
    world,
):
    """The streams of all ranks, in rounds of `each` images."""
    with ExitStack() as stack:
        streams = []
        for rank in range(world):
            stream = Stream(
                config,
                seed=seed,
                round_size=each,
                rank=rank,
                world=world,
            )
            streams.append(stack.enter_context(stream))
        yield streams


def take(
    path,
    rounds,
    world=1,
    *,
    each=12,
    **settings,
):
    """All images of rounds 0, 1, ..., of `each` images, and their keys, in order."""
    images = []
    keys = []
    config = DataConfig(path=path, **settings)
    with streams_of(config, seed=5, each=each, world=world) as streams:
        for round in range(rounds):
            for stream in streams:
                taken = stream.take(round)
                images.append(taken.images)
                keys += taken.keys
    return torch.cat(images), keys
