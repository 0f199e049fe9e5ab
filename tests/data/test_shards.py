"""Packing, and what a packed data set is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from naign.data.format.audit import verify
from naign.data.format.indexing import index
from naign.data.format.manifest import Manifest
from naign.data.format.pages import table_name
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.catalog import load
from naign.storage.local import LocalStore
from tests.data.numbered import first, numbered
from tests.refused import refused


def contents(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def test_shards_are_even_random_and_complete(packed):
    manifest = Manifest.load(packed)
    train = manifest.split("train")
    assert [shard.samples for shard in train.shards] == [5, 6, 6, 6]
    assert train.samples == 23
    names = {shard.name for shard in manifest.shards}
    assert {"index.json", *names, *map(table_name, names)} == set(contents(packed))
    images, labels = read_split(packed, "train")
    indices = images[:, 0, 0, 0].tolist()
    assert sorted(indices) == list(range(23)) != indices
    assert labels.tolist() == [index % 2 for index in indices]


@pytest.mark.parametrize("encoding", ["png", "npy"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7)])
def test_pixels_survive(tmp_path, encoding, shape):
    source = numbered(shape=shape)
    pack(
        source,
        str(tmp_path),
        shards=2,
        encoding=encoding,
    )
    images, _ = read_split(str(tmp_path), "train")
    for image in images.numpy():
        _, expected, _ = source.splits["train"][int(image.flat[0])]
        assert (image == expected).all()


def test_points_survive(tmp_path):
    source = first(load("toy2d:gaussians"), 50)
    pack(source, str(tmp_path))
    points = read_split(str(tmp_path), "test")[0].numpy()
    assert points.dtype == np.float32
    for number in range(50):
        _, point, _ = source.splits["test"][number]
        assert (points == point).all(1).sum() == 1


def test_any_webdataset_program_reads_them(packed):
    urls = [f"{packed}/train-{number:05d}.tar" for number in range(4)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("l8")
    samples = list(dataset.to_tuple("png", "cls"))
    assert len(samples) == 23
    assert all(image[0, 0] % 2 == label for image, label in samples)


def test_an_index_of_our_own_tars_names_the_same_samples(packed):
    before = contents(packed)
    made = index(packed, name="numbered", force=True)
    ours = Manifest.parse(before["index.json"], where="")
    assert replace(made, dealt=True, labels=ours.labels) == ours
    assert {**contents(packed), "index.json": before["index.json"]} == before


def test_jpg_and_other_encodings(tmp_path):
    pack(
        numbered(),
        str(tmp_path),
        shards=2,
        encoding="jpg",
    )
    assert verify(str(tmp_path))[0] == 28
    with refused("use one of png, jpg, npy"):
        pack(numbered(), str(tmp_path), encoding="bmp")


def test_packing_again_changes_nothing_and_another_set_is_refused(packed):
    before = contents(packed)
    assert pack(numbered(), packed, shards=4) == (Manifest.load(packed), False)
    for source, shards, seed in (
        (numbered(), 3, 0),
        (numbered(), 4, 1),
        (numbered(train=22), 4, 0),
    ):
        with refused("already holds another data set"):
            pack(source, packed, shards=shards, seed=seed)
    assert contents(packed) == before
    (Path(packed) / "train-00001.tar").unlink()
    (Path(packed) / "train-00002.pages.npy").unlink()
    pack(numbered(), packed, shards=4)
    assert contents(packed) == before
    assert pack(numbered(), packed, shards=3, force=True)[1]
    assert len(contents(packed)) == 2 * (3 + 3) + 1
    verify(packed)


def test_an_interrupted_pack_leaves_no_index_and_goes_on(packed, tmp_path, monkeypatch):
    target = f"{tmp_path}/target"
    put = LocalStore.put
    done = []

    def failing(self, name, source):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        put(self, name, source)

    monkeypatch.setattr(LocalStore, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(numbered(), target, shards=4)
    monkeypatch.undo()
    with refused("5 files, no index.json"):
        Manifest.load(target)
    with refused("already holds another data set"):
        pack(numbered(), target, shards=3)
    assert pack(numbered(), target, shards=4)[1]
    assert contents(target) == contents(packed)


def test_impossible_numbers_of_shards(tmp_path):
    for shards in (0, 24):
        with refused("cannot deal 23 train samples"):
            pack(numbered(), str(tmp_path), shards=shards)
    with refused("test split is empty"):
        pack(numbered(test=0), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_data_set(packed, tmp_path):
    for path, message in (
        (f"{tmp_path}/nowhere", "no data set here: 0 files, no index.json: .*naign pack folder"),
        (f"{packed}/index.json", "not a directory: check the path"),
        ("ftpx://bucket/mnist", "cannot read ftpx://"),
    ):
        with refused(message):
            Manifest.load(path)
    (Path(packed) / "index.json").write_text(json.dumps({}))
    with refused("malformed.* with --force"):
        pack(numbered(), packed, shards=4)
