"""Indexing tars that others wrote, and what is refused of them."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format import indexing
from naign.data.format.audit import verify
from naign.data.format.indexing import index
from naign.data.format.manifest import Manifest
from naign.data.loader import Stream, read_split
from naign.storage.local import LocalStore
from naign.storage.store import open_store
from tests.data.numbered import add
from tests.refused import refused

TARS = [f"{number:05d}.tar" for number in range(7)]


def png(value):
    return encode(np.full((1, 4, 4), value % 256, np.uint8), "png")


def tar_of(members, format=tarfile.PAX_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            add(tar, name, data)
    return stream.getvalue()


def write(path, names, each=3, **fields):
    """Tars of so many pictures each, whose value is their number modulo 256; `fields` make further members from it."""
    for place, name in enumerate(names):
        members = []
        for number in range(place * each, (place + 1) * each):
            members.append((f"{number:05d}.png", png(number)))
            members += [(f"{number:05d}.{suffix}", make(number)) for suffix, make in fields.items()]
        open_store(str(path)).put(name, tar_of(members))


def indexed(path, **options):
    return index(str(path), **options)


def checked(path, **options):
    return verify(str(path), **options)[0]


# What is found


@pytest.mark.parametrize("remote", [False, True])
def test_an_index_lies_elsewhere(bucket, tmp_path, remote):
    theirs = f"{bucket}/theirs"
    mine = f"{bucket}/mine" if remote else f"{tmp_path}/mine"
    write(theirs, [*TARS, "val.tar"])
    manifest = indexed(theirs, to=mine)
    assert open_store(theirs).list() == [*TARS, "val.tar"]
    assert len(open_store(mine).list()) == 9
    assert Manifest.load(mine) == manifest
    config = DataConfig(path=theirs, index=mine)
    images, _ = read_split(config, "train")
    assert images[:, 0, 0, 0].tolist() == list(range(21))
    with Stream(config, seed=0, round_size=21) as stream:
        images = stream.take(0).images
    assert sorted(images[:, 0, 0, 0].tolist()) == list(range(21))
    assert checked(theirs, index=mine) == 24
    with refused(r"8 files, no index.json"):
        read_split(theirs, "train")


def test_braces_and_patterns_choose_tars(tmp_path):
    write(tmp_path, TARS)
    for pattern, count in (
        ("{00001..00003}.tar", 9),
        ("0000{1,[45]}.tar", 9),
        ("00006.tar", 3),
    ):
        made = indexed(tmp_path / pattern, to=f"{tmp_path}/index", force=True)
        assert made.split("train").samples == count
    with refused(r"00007\.tar: no such file"):
        indexed(tmp_path / "{00006..00007}.tar", to=f"{tmp_path}/other")
    with refused(r"no \.tar there"):
        indexed(tmp_path / "x*.tar")
    write(tmp_path / "data[1]", TARS[:1])
    assert indexed(tmp_path / "data[1]").name == "data[1]"  # the name of a folder is not a pattern


def test_names_say_which_tars_are_for_testing(tmp_path):
    write(tmp_path, ["x-train.tar", "x-val.tar"])
    manifest = indexed(tmp_path)
    assert manifest.split("train").samples == 3
    assert manifest.split("test").samples == 3
    with refused("index.json is there already: .*--force"):
        indexed(tmp_path)
    (shard,) = indexed(tmp_path, force=True, test="*train*").split("test").shards
    assert shard.name == "x-train.tar"
    for pattern, split in (("*", "train"), ("y*", "test")):
        with refused(rf"none of its 2 tars .* is for {split}: see --test"):
            indexed(tmp_path, force=True, test=pattern)


def grey(mode, form):
    """A picture of 4 x 4 pixels of the value 128."""
    stream = io.BytesIO()
    Image.new("L", (4, 4), 128).convert(mode).save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers(tmp_path, format):
    last = 40 if format == tarfile.USTAR_FORMAT else 120
    long = "folder/" + "x" * 90 + "/" + "y" * last
    members = [
        ("__meta__/notes.txt", b"not a sample"),
        ("a/0001.PNG", png(1)),
        ("a/0001.cls", b"0"),
        ("a/0002.json", b"{}"),
        ("a/0002.png", png(1)),
        ("a/0002.cls", b"0"),
        ("a/0002.seg.png", b"another member"),
        (f"{long}.cls", b"1"),
        (f"{long}.png", png(1)),
        ("README", b"no suffix: not a sample"),
    ]
    (tmp_path / "train.tar").write_bytes(tar_of(members, format))
    manifest = indexed(tmp_path)
    assert manifest.shape == (1, 4, 4)
    assert manifest.labels == ("0", "1")
    assert [*manifest.splits] == ["train"]
    images, labels = read_split(str(tmp_path), "train")
    assert images.tolist() == [[[[1] * 4] * 4]] * 3
    assert labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("decoded", [None, 0])
def test_what_is_indexed_is_read(tmp_path, decoded):
    """Grey samples beside colour ones, however they are stored."""
    colour = np.full((3, 4, 4), 128, np.uint8)
    members = [
        ("00.png", grey("L", "PNG")),
        ("01.png", grey("P", "PNG")),
        ("03.jpg", grey("L", "JPEG")),
        ("04.jpg", grey("CMYK", "JPEG")),
        ("05.webp", grey("RGB", "WEBP")),
        ("06.npy", encode(colour[:1], "npy")),
        ("07.npy", encode(colour, "npy")),
        ("08.npy", encode(np.asfortranarray(colour), "npy")),
    ]
    (tmp_path / "train.tar").write_bytes(tar_of(members))
    assert indexed(tmp_path, sample_check=decoded).shape == (3, 4, 4)
    assert checked(tmp_path) == 8
    for size, side in (("", 4), ("8", 8)):
        images, _ = read_split(DataConfig(path=str(tmp_path), size=size), "train")
        assert images.shape == (8, 3, side, side)
        assert ((images.int() - 128).abs() < 3).all()


def test_headers_alone_are_read_beyond_the_pictures_to_check(tmp_path):
    members = [("0.png", png(0)), ("1.png", png(1)[:45])]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    manifest = indexed(tmp_path, to=f"{tmp_path}/1", sample_check=1)
    assert manifest.split("train").samples == 2
    with refused(r"1 problems\n.*key 1: the \.png cannot be decoded"):
        indexed(tmp_path, to=f"{tmp_path}/2", sample_check=2)


@pytest.mark.parametrize(
    "label, suffix, make, names, expected",
    [
        (
            "json:kind",
            "json",
            lambda n: b'{"kind": "%s"}' % (b"cat", b"dog")[n % 2],
            ("cat", "dog"),
            [0, 1, 0],
        ),
        (
            "json:id",
            "json",
            lambda n: b'{"id": "%s"}' % (b"7", b"007", b"10")[n],
            ("007", "7", "10"),
            [1, 0, 2],
        ),
        (
            "",
            "cls",
            lambda n: b"%d" % (2 * n),
            ("0", "1", "2", "3", "4"),
            [0, 2, 4],
        ),
        (
            "",
            "txt",
            lambda n: b"a caption",
            (),
            [-1, -1, -1],
        ),
    ],
)
def test_labels_are_found_where_they_are(
    tmp_path,
    label,
    suffix,
    make,
    names,
    expected,
):
    write(tmp_path, ["train.tar"], **{suffix: make})
    assert indexed(tmp_path, label=label).labels == names
    assert read_split(str(tmp_path), "train")[1].tolist() == expected
    assert checked(tmp_path) == 3


# What is refused


@pytest.mark.parametrize(
    "label, message",
    [
        ("text", "--label 'text': give json:FIELD"),
        ("json:kind", "no sample has a label where --label says: json:kind"),
    ],
)
def test_labels_that_are_nowhere(tmp_path, label, message):
    write(tmp_path, ["train.tar"], json=lambda n: b"{}")
    with refused(message):
        indexed(tmp_path, label=label)
    assert not list(tmp_path.glob("index.json"))
    assert not list(tmp_path.glob("*.npy"))


def npy(*shape, kind=np.uint8):
    return encode(np.zeros(shape, kind), "npy")


PNG = ("a.png", png(0))


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.npy", npy(4, 4, 4))], "key a: the .npy is uint8 of .4, 4, 4., but images are uint8 .1 or 3"),
        ([("a.npy", npy(3, 0, 5))], "no values, its shape is .3, 0, 5"),
        ([("a.npy", npy(1, 4, 4)[:-3])], "key a: the .npy cannot be decoded"),
        ([PNG, ("b.cls", b"1")], "train.tar, key b: no member ends in png or"),
        ([PNG, PNG], r"train.tar, key a: two members end in \.png"),
        ([PNG, ("b.png", png(0)), ("a.cls", b"1")], "train.tar, key a: no member ends in png or"),
        ([PNG, ("b.png", png(0)[:40])], r"train.tar, key b: the \.png cannot be decoded"),
        ([PNG, ("b.npy", npy(4, kind=np.float32))], "samples of several forms.*: image .1, 4, 4., point .4,."),
        ([PNG, ("a.cls", b"cat")], "label 'cat' is not a number below 1000000"),
        ([("README", b"x")], "train.tar: holds no samples"),
    ],
)
def test_samples_that_no_index_can_name(tmp_path, members, message):
    refuse(tmp_path, tar_of(members), message)


def refuse(folder, data, message):
    (folder / "train.tar").write_bytes(data)
    with refused(message):
        indexed(folder)
    assert os.listdir(folder) == ["train.tar"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:700], "truncated or no tar"),
        (lambda data: data[:2048], "ends in the middle: no end-of-archive mark"),
        (lambda data: data + data, "more data behind the end of the archive"),
        (lambda data: data[:2048] + b"x" * 512 + data[2560:], "from byte 2048 on no tar"),
        (lambda data: b"", "train.tar"),
        (gzip.compress, "truncated or no tar"),
    ],
)
def test_files_that_are_no_whole_tar(tmp_path, damage, message):
    whole = tar_of([("a.png", png(0)), ("b.png", png(1))])
    refuse(tmp_path, damage(whole), message)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("b.png")
    link.type = kind
    link.linkname = "a.png"
    data = tar_of([("a.png", png(0))])
    refuse(tmp_path, data[:1024] + link.tobuf() + data[1024:], r"train.tar: b.png is a link or sparse")


def test_broken_pictures_may_be_kept(tmp_path):
    """And are known then; others are not: those that break later, or whose bytes change."""
    write(tmp_path, TARS[:2])
    spoil(tmp_path / TARS[0])
    with refused(r"1 problems\n.*key 00000: the \.png cannot be decoded"):
        indexed(tmp_path)
    manifest = indexed(tmp_path, keep_broken=True)
    assert manifest.broken == {TARS[0]: ["00000"]}
    assert Manifest.load(str(tmp_path)) == manifest
    with refused(r"key 00000: the \.png cannot be decoded"):
        read_split(str(tmp_path), "train")
    assert verify(str(tmp_path))[1] == [f"{TARS[0]} 00000"]
    spoil(tmp_path / TARS[1])
    with refused(rf"{TARS[1]}: the SHA-256 of what follows byte"):
        checked(tmp_path)


def spoil(file):
    """Overwrite the header of the first picture."""
    data = bytearray(file.read_bytes())
    start = data.index(b"IDAT") - 20
    data[start : start + 8] = b"\xff" * 8
    file.write_bytes(data)


def test_nothing_but_broken_pictures(tmp_path):
    (tmp_path / "train.tar").write_bytes(tar_of([("a.png", png(0)[:40])]))
    with refused("none that can be decoded"):
        indexed(tmp_path, keep_broken=True)


def test_a_forced_index_replaces_the_old_one(tmp_path, monkeypatch):
    """Interrupted before any of its writes and deletions, it leaves the old index, or none."""
    monkeypatch.setattr(indexing, "THREADS", 1)
    old = f"{tmp_path}/old"
    new = f"{tmp_path}/new"
    mine = f"{tmp_path}/mine"
    write(old, TARS[:3])
    write(new, TARS[:3], each=5)
    left = [0]  # calls until the interruption

    def interrupted(call):
        def changed(store, name, *rest):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            call(store, name, *rest)

        return changed

    monkeypatch.setattr(LocalStore, "put", interrupted(LocalStore.put))
    monkeypatch.setattr(LocalStore, "delete", interrupted(LocalStore.delete))
    states = []
    while "finished" not in states:
        left[0] = 10_000
        indexed(old, to=mine, force=True)
        left[0] = len(states)
        try:
            indexed(new, to=mine, force=True)
            states.append("finished")
        except KeyboardInterrupt:
            left[0] = 10_000
            states.append(state_of(old, mine))
    order = ["old", "none", "finished"]
    assert set(states) == set(order)
    assert states == sorted(states, key=order.index)
    left[0] = 10_000
    config = DataConfig(path=new, index=mine)
    assert len(read_split(config, "train")[0]) == 15


def state_of(old, mine):
    """Whether the old data set has the index, every byte of it agreeing with that."""
    if not (Path(mine) / "index.json").exists():
        return "none"
    assert checked(old, index=mine) == 9
    return "old"
