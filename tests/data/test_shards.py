"""Packing, the manifest, and verifying."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from naign.data.decode import encode
from naign.data.format.audit import verify
from naign.data.format.manifest import Manifest
from naign.data.format.pages import table_name
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.catalog import load
from naign.data.sources.source import Example, Made
from naign.errors import InputError
from naign.storage.local import LocalStore
from tests.data.numbered import edit_index, numbered, rewrite


def contents(path: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def test_the_same_source_gives_the_same_bytes(packed: str, tmp_path: Path) -> None:
    pack(numbered(), str(tmp_path / "again"), shards=4, progress=False)
    assert contents(packed) == contents(tmp_path / "again")


def test_shards_are_even_random_and_complete(packed: str) -> None:
    manifest = Manifest.load(packed)
    train = manifest.split("train")
    assert [shard.samples for shard in train.shards] == [5, 6, 6, 6] and train.samples == 23
    assert {"index.json"} | {
        name for split in manifest.splits.values() for s in split.shards for name in (s.name, table_name(s.name))
    } == set(contents(packed))
    images, labels = read_split(packed, "train")
    indices = images[:, 0, 0, 0].tolist()
    assert sorted(indices) == list(range(23)) != indices
    assert labels.tolist() == [index % 2 for index in indices]


def test_pixels_and_points_survive(packed: str, tmp_path: Path) -> None:
    source = numbered(train=6, shape=(3, 5, 5))
    pack(source, str(tmp_path / "colour"), progress=False)
    images, _ = read_split(str(tmp_path / "colour"), "train")
    for image in images.numpy():
        assert (image == source.splits["train"][int(image.flat[0])][1]).all()

    toy = load("toy2d:moons")
    few = replace(toy, splits={name: Made(length=50, make=split.__getitem__) for name, split in toy.splits.items()})
    pack(few, str(tmp_path / "toy"), progress=False)
    points, _ = read_split(str(tmp_path / "toy"), "test")
    assert points.numpy().dtype == np.float32
    assert {tuple(p) for p in points.tolist()} == {tuple(few.splits["test"][i][1].tolist()) for i in range(50)}


def test_any_webdataset_program_reads_them(packed: str) -> None:
    urls = [f"{packed}/train-{number:05d}.tar" for number in range(4)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8").to_tuple("png", "cls"))
    assert len(samples) == 23
    assert all(image[0, 0] % 2 == label for image, label in samples)


def test_jpg(tmp_path: Path) -> None:
    pack(numbered(), str(tmp_path), shards=2, encoding="jpg", progress=False)
    assert verify(str(tmp_path), progress=False).samples == 28
    with pytest.raises(InputError, match="use one of png, jpg, webp, npy"):
        pack(numbered(), str(tmp_path), encoding="bmp", progress=False)


def test_packing_again_changes_nothing_and_another_set_is_refused(packed: str) -> None:
    before = contents(packed)
    assert pack(numbered(), packed, shards=4, progress=False) == (Manifest.load(packed), False)
    for source, shards, seed in ((numbered(), 3, 0), (numbered(), 4, 1), (numbered(train=22), 4, 0)):
        with pytest.raises(InputError, match="already holds another data set"):
            pack(source, packed, shards=shards, seed=seed, progress=False)
    assert contents(packed) == before
    assert pack(numbered(), packed, shards=3, force=True, progress=False)[1]
    assert len(contents(packed)) == 2 * (3 + 3) + 1
    verify(packed, progress=False)


def test_what_cannot_be_packed_replaces_nothing(packed: str) -> None:
    before, source = contents(packed), numbered()

    def make(index: int) -> Example:
        if index == 3:
            raise InputError("3.png: no picture")
        return source.splits["test"][index]

    broken = replace(source, splits={**source.splits, "test": Made(length=5, make=make)})
    with pytest.raises(InputError, match="no picture"):
        pack(broken, packed, shards=3, force=True, progress=False)
    assert contents(packed) == before


def test_an_interrupted_pack_leaves_no_index_and_goes_on(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, put = str(tmp_path / "target"), LocalStore.put
    done: list[str] = []

    def failing(self: LocalStore, name: str, source: Path | bytes) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        put(self, name, source)

    monkeypatch.setattr(LocalStore, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(numbered(), target, shards=4, progress=False)
    monkeypatch.undo()
    with pytest.raises(InputError, match="no index.json among its 5 files"):
        Manifest.load(target)
    with pytest.raises(InputError, match="already holds shards of another"):
        pack(numbered(), target, shards=3, progress=False)
    assert pack(numbered(), target, shards=4, progress=False)[1]
    assert contents(target) == contents(packed)


def test_a_lost_shard_is_packed_again(packed: str) -> None:
    before = contents(packed)
    (Path(packed) / "train-00001.tar").unlink()
    (Path(packed) / "train-00002.tar").write_bytes(b"cut")
    pack(numbered(), packed, shards=4, progress=False)
    assert contents(packed) == before


def test_impossible_numbers_of_shards(tmp_path: Path) -> None:
    for shards in (0, 24):
        with pytest.raises(InputError, match="cannot deal 23 train samples"):
            pack(numbered(), str(tmp_path), shards=shards, progress=False)
    with pytest.raises(InputError, match="test split is empty"):
        pack(numbered(test=0), str(tmp_path), progress=False)
    assert not list(tmp_path.iterdir())


def test_manifests_that_cannot_be_read(packed: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing or empty: .*naign pack folder"):
        Manifest.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="or make one: `naign pack digits --to .*/digits`"):
        Manifest.load(str(tmp_path / "digits"))
    with pytest.raises(InputError, match="naign pack folder --root PICTURES --size 64 --to .*/parquet`"):
        Manifest.load(str(tmp_path / "parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="missing or empty: .*naign pack folder"):
        Manifest.load(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="give a folder"):
        Manifest.load(f"{packed}/index.json")
    with pytest.raises(InputError, match="cannot read ftpx://"):
        Manifest.load("ftpx://bucket/mnist")
    with pytest.raises(InputError, match="no split 'valid'.*train, test"):
        Manifest.load(packed).split("valid")
    good = json.loads((Path(packed) / "index.json").read_text())
    for fields, message in (
        ({"format": 1}, "format 1, but .*naign index --force"),
        ({"kind": "sound"}, "malformed.*sound"),
        ({"shape": [4, 4]}, "malformed.*do not go together"),
        ({"splits": {}}, "malformed.*no splits"),
        ({"splits": {"train": {**good["splits"]["train"], "samples": 24}}}, "malformed.*do not add up to 24"),
        ({"colour": 1}, "malformed.*colour"),
    ):
        edit_index(packed, **{**good, **fields})
        with pytest.raises(InputError, match=message):
            Manifest.load(packed)
        (Path(packed) / "index.json").write_text(json.dumps(good))
    (Path(packed) / "index.json").write_text("{")
    with pytest.raises(InputError, match="malformed.* with --force"):
        pack(numbered(), packed, shards=4, progress=False)


def test_what_a_pack_that_was_killed_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".partial-0").write_bytes(b"a part")
    with LocalStore(str(tmp_path)).write("other") as target:
        target.write(b"of a writer at work")
        pack(numbered(), str(tmp_path), shards=2, progress=False)
        assert len(list(tmp_path.glob(".partial-*"))) == 1
    assert (tmp_path / "other").exists() and not list(tmp_path.glob(".partial-*"))


def test_of_two_packs_into_one_folder_at_once_the_second_is_refused(tmp_path: Path) -> None:
    with LocalStore(str(tmp_path)).alone(), pytest.raises(InputError, match="another program packs there: wait"):
        pack(numbered(), str(tmp_path), progress=False)
    assert not list(tmp_path.iterdir())
    assert pack(numbered(), str(tmp_path), progress=False)[1]


def test_verify_finds_every_planted_fault(packed: str) -> None:
    report = verify(packed, progress=False)
    assert (report.samples, report.shards) == (28, 8)
    folder = Path(packed)
    first = {}

    def twist(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        first["key"] = members[0][0].partition(".")[0]
        wide = encode(np.zeros((1, 4, 5), np.uint8), "png")
        names = [name for name, _ in members]
        assert names[1].endswith(".png") and names[0].endswith(".cls")
        return [(names[0], b"7"), members[1], members[2], (names[3], b"no png"), members[4], (names[5], wide)]

    rewrite(packed, "train-00000.tar", lambda members: members[:-2], damage=True)
    rewrite(packed, "train-00001.tar", twist, damage=True)
    shutil.copy(folder / "train-00003.tar", folder / "train-00002.tar")
    cut = folder / "test-00000.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    flipped = bytearray((folder / "test-00001.tar").read_bytes())
    flipped[-1] ^= 1  # in the padding: still the same samples
    (folder / "test-00001.tar").write_bytes(flipped)
    (folder / "test-00002.tar").unlink()
    with pytest.raises(InputError) as caught:
        verify(packed, progress=False)
    said = str(caught.value)
    for shard, problem in (
        ("train-00000.tar", "4 samples, but index.json says 5"),
        ("train-00001.tar", f"key {first['key']}: label '7'"),
        ("train-00001.tar", "the .png cannot be decoded"),
        ("train-00001.tar", "shape (1, 4, 5), but index.json says (1, 4, 4)"),
        ("train-00001.tar", "3 samples, but index.json says 6"),
        ("train-00003.tar", "also in train-00002.tar"),
        ("train-00002.tar", "SHA-256"),
        ("test-00000.tar", "1000 bytes, but index.json says"),
        ("test-00000.tar", "truncated or no tar"),
        ("test-00001.tar", "SHA-256"),
        ("test-00002.tar", "no such file"),
    ):
        assert any(shard in line and problem in line for line in said.splitlines()), (shard, problem, said)
