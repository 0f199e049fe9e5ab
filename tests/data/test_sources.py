"""What can be packed."""

import gzip
import io
import os
import shutil
import tarfile
from functools import partial
from importlib.metadata import EntryPoint
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from naign.cli.data import pack as pack_command
from naign.data.decode import decode_image
from naign.data.format.audit import verify
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.resize import Resize, resized
from naign.data.resize import channels as to_channels
from naign.data.sources import published
from naign.data.sources.catalog import load
from naign.data.sources.source import subset
from naign.errors import Unavailable
from tests.data.numbered import add
from tests.refused import refused


def picture(
    path,
    size=(8, 8),
    colour=(200, 100, 50),
    mode="RGB",
):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def folder(root, **options):
    return load(
        "folder",
        root=root,
        **{"size": 4, **options},
    )


def keys(made):
    return [made[index][0] for index in range(len(made))]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Not that of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Digits, points and subsets


def test_digits():
    source = load("digits")
    train = source.splits["train"]
    test = source.splits["test"]
    assert (len(train), len(test)) == (1438, 359)
    assert len({*keys(train), *keys(test)}) == 1797
    _, image, label = train[0]
    assert image.shape == source.shape == (1, 8, 8)
    assert image.dtype == np.uint8
    assert 0 <= label < 10
    assert max(test[index][1].max() for index in range(len(test))) == 255


def test_points_are_drawn_alike_and_fit_the_square():
    train = load("toy2d:gaussians", seed=3).splits["train"]
    same = load("toy2d:gaussians", seed=3).splits["train"]
    other = load("toy2d:gaussians", seed=4).splits["train"]
    points = np.stack([train[row][1] for row in range(4000)])
    assert points.shape == (4000, 2)
    assert points.dtype == np.float32
    assert (points[0] == same[0][1]).all()
    assert (points[0] != other[0][1]).any()
    assert 0.69 < np.abs(points).max() < 1.3
    shares = np.bincount([train[row][2] for row in range(4000)]) / 4000
    assert len(shares) == 8
    assert np.allclose(shares, 1 / 8, atol=0.03)


def test_a_number_after_the_name_keeps_as_many_training_examples():
    whole = load("digits")
    few = load("digits:100", seed=1)
    assert len(few.splits["test"]) == len(whole.splits["test"])
    kept = keys(few.splits["train"])
    assert len(set(kept)) == 100
    assert set(kept) < set(keys(whole.splits["train"]))
    same = subset(whole, 100, seed=1)
    other = subset(whole, 100, seed=2)
    assert kept == keys(same.splits["train"])
    assert kept != keys(other.splits["train"])
    with pytest.raises(IndexError):
        few.splits["train"][100]
    for number in (0, 2000):
        with refused(f"digits has 1438 training examples: .*not for {number}"):
            load(f"digits:{number}")


def test_names_and_options_that_do_not_fit(tmp_path):
    for name, options, message in (
        ("mnits", {}, "'mnits': choose one of mnist,"),
        ("toy2d:moon", {}, "choose toy2d:gaussians"),
        ("digits", {"size": 16}, "digits does not take --size: leave it out"),
        ("folder", {}, "add --root"),
        ("folder", {"root": tmp_path, "size": 8}, "0 pictures, and at least 2"),
        ("folder", {"root": tmp_path, "size": 8, "channels": 2}, "--channels 1 or 3"),
        ("folder", {"root": tmp_path, "size": 10_000_000}, "--size is '10000000'.* to 8192"),
        ("mnist", {"root": tmp_path}, "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("cifar10", {"root": tmp_path}, "no cifar-10-binary.tar.gz or"),
    ):
        with refused(message):
            load(name, **options)


def test_a_source_of_another_package(monkeypatch, tmp_path):
    points = {"naign.sources": {"numbered:<name>": EntryPoint("numbered:<name>", "tests.data.numbered:build", "")}}
    monkeypatch.setattr("naign.settings.registry._entry_points", lambda group: points.get(group, {}))
    assert len(load("numbered:7").splits["train"]) == 7
    with refused("numbered:7 does not take --root: leave it out"):
        load("numbered:7", root=tmp_path)
    with refused(r"'numbered': choose one of mnist, .*numbered:<name>"):
        load("numbered")


# Trees of pictures


def test_folder_with_its_own_split(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        for label, index in product(("cat", "a dog.v2"), range(number)):
            picture(tmp_path / split / label / f"{index}.x.png")
    picture(tmp_path / "train/cat/0.x.jpg")
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    source = folder(tmp_path)
    assert source.labels == ("a dog.v2", "cat")
    assert source.shape == (3, 4, 4)
    train = source.splits["train"]
    dogs = ["a dog_v2/0_x", "a dog_v2/1_x", "a dog_v2/2_x"]
    assert keys(train) == [*dogs, "cat/0_x", "cat/0_x_2", "cat/1_x", "cat/2_x"]
    assert train[2][2] == 0
    assert train[3][2] == 1
    assert train[0][1][:, 0, 0].tolist() == [200, 100, 50]
    picture(tmp_path / "stray.png")
    with refused("stray.png: lies beside train/ and test/"):
        folder(tmp_path)
    (tmp_path / "stray.png").unlink()
    shutil.rmtree(tmp_path / "test/cat")
    shutil.rmtree(tmp_path / "test/a dog.v2")
    with refused("test/ holds no pictures"):
        folder(tmp_path)


def test_folder_without_split_and_labels(tmp_path):
    for number in range(20):
        picture(tmp_path / f"{number}.png", mode="L", colour=number)
    grey = folder(tmp_path, channels=1)
    test = keys(grey.splits["test"])
    same = folder(tmp_path, seed=0)
    other = folder(tmp_path, seed=1)
    assert len(test) == 2
    assert test == keys(same.splits["test"])
    assert test != keys(other.splits["test"])
    assert grey.labels == ()
    assert grey.splits["train"][0][2] == -1
    assert grey.shape == (1, 4, 4)


def test_links_to_folders_are_followed(tmp_path):
    """Such as classes that lie on another disk."""
    picture(tmp_path / "elsewhere/0.png")
    picture(tmp_path / "tree/cat/0.png")
    (tmp_path / "tree/dog").symlink_to(tmp_path / "elsewhere")
    source = folder(tmp_path / "tree")
    assert source.labels == ("cat", "dog")
    found = keys(source.splits["train"]) + keys(source.splits["test"])
    assert sorted(found) == ["cat/0", "dog/0"]
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "tree")
    with refused("dog/back: a link that leads to a folder of the tree"):
        folder(tmp_path / "tree")


@pytest.mark.parametrize("to", ["nowhere", "loop"])
def test_links_to_nothing(tmp_path, to):
    picture(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path / to)
    with refused("loop: neither file nor folder, or a link that leads to none"):
        folder(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    for label in ("cat", "dog"):
        picture(tmp_path / label / "a.png")
    source = folder(tmp_path)
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", scandir)  # root may read every folder
        with refused("dog: cannot be read .Permission denied.: check the owner and mode"):
            folder(tmp_path)
    monkeypatch.setattr("pathlib.Path.read_bytes", Mock(side_effect=PermissionError(13, "Permission denied")))
    with refused("cannot be read .Permission denied.: check its owner and mode$"):
        source.splits["train"][0]


def test_names_that_no_key_can_have(tmp_path):
    for name in (b"caf\xe9.png", b"a\nb.png", b"a_b.png"):
        picture(tmp_path / os.fsdecode(name))
    source = folder(tmp_path)
    found = {*keys(source.splits["train"]), *keys(source.splits["test"])}
    assert found in ({"caf_", "a_b"}, {"caf_", "a_b", "a_b_2"})  # two of them in different splits, or not
    pack(source, f"{tmp_path}/packed")
    assert verify(f"{tmp_path}/packed")


def test_files_of_no_picture_are_left_out(tmp_path, caplog):
    tree = tmp_path / "tree"
    target = tmp_path / "packed"
    for split, label, number in product(("train", "test"), "ab", range(3)):
        picture(tree / split / label / f"{number}.png")
    odd = tree / "train/a/new\nline.txt"
    odd.write_text("hello")
    settings = {"root": tree, "size": "4"}
    pack_command("folder", to=str(target), shards=2, **settings)
    assert "new_line.txt: not a picture that Pillow can read: left out" in caplog.text
    assert Manifest.load(str(target)).split("train").samples == 6
    assert verify(str(target))[0] == 12
    for file in (tree / "train/a").iterdir():
        file.write_text("hello")
    pack_command("folder", to=f"{target}2", shards=6, **settings)
    kept = Manifest.load(f"{target}2")
    assert [len(kept.split(split).shards) for split in ("train", "test")] == [3, 6]  # none without a picture
    assert verify(f"{target}2")[0] == 9
    for file in (tree / "train/b").iterdir():
        file.write_text("hello")
    with refused("no picture of a split can be read"):
        pack_command("folder", to=f"{target}3", shards=6, **settings)
    before = {file: file.read_bytes() for file in target.iterdir()}
    with refused("no picture of a split can be read"):
        pack_command(
            "folder",
            to=str(target),
            shards=6,
            force=True,
            **settings,
        )
    assert {file: file.read_bytes() for file in target.iterdir()} == before
    (target / "index.json").write_bytes((target / "index.json").read_bytes().replace(b'"folder"', b'"other"'))
    for file in target.glob("*.tar"):
        file.unlink()
    left = set(target.iterdir())
    tables = [file for file in left if file.suffix == ".npy"]
    for file in tables:
        file.unlink()
    picture(tree / "train/a/0.png")
    with refused("already holds another data set"):
        pack_command("folder", to=str(target), shards=2, **settings)
    assert set(target.iterdir()) == left - set(tables)
    with refused("is --root: give another folder"):
        pack_command("folder", to=str(tree), **settings)


def test_memory_that_does_not_suffice_is_no_broken_picture(tmp_path, monkeypatch):
    for number in range(3):
        picture(tmp_path / f"tree/{number}.png")
    monkeypatch.setattr("naign.data.decode.PLAIN_PIXELS", 0)
    monkeypatch.setattr("naign.data.decode._open_picture", Mock(side_effect=MemoryError))
    with pytest.raises(Unavailable, match="too little memory to decode a picture: free some"):
        pack_command(
            "folder",
            to=f"{tmp_path}/packed",
            root=tmp_path / "tree",
            size="4",
        )


# What pictures become


def read(image, kind, channels=1):
    stream = io.BytesIO()
    image.save(stream, kind)
    resize = Resize(height=image.height, width=image.width)
    return to_channels(resized(stream.getvalue(), resize), channels)


@pytest.mark.parametrize(
    "dtype, kind",
    [
        ("<u2", "PNG"),
        ("<u2", "TIFF"),
        (">u2", "TIFF"),
        ("<i4", "TIFF"),
    ],
)  # modes I;16, I;16B and I
def test_sixteen_bits_are_scaled(dtype, kind):
    values = np.array([[0, 257 * 100], [256, 65535]], dtype)
    for channels in (1, 3):
        pixels = read(Image.fromarray(values), kind, channels)
        assert (pixels == [[0, 100], [1, 255]]).all()


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (0.5, np.float32, "mode F"),
        (65536, np.int32, "mode I, pixels beyond 16 bits"),
    ],
)
def test_pixels_of_no_known_range(value, dtype, message):
    values = np.full((2, 2), value, dtype)
    with refused(message):
        read(Image.fromarray(values), "TIFF")


def test_no_other_program_is_started_for_a_picture():
    with refused("not a picture that Pillow can read"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Ghostscript would be
    content = io.BytesIO()
    Image.new("RGB", (3, 2)).save(content, "TIFF")
    assert decode_image(content.getvalue()).shape == (3, 2, 3)


# Published data sets


def test_cifar10_binary_records(tmp_path, monkeypatch):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
            add(tar, f"cifar-10-batches-bin/{name}.bin", bytes([4]) + bytes(range(256)) * 12)
    (tmp_path / published.CIFAR_FILE).write_bytes(stream.getvalue())
    monkeypatch.setattr(published, "checked", lambda _, data, __: data)
    source = load("cifar10", root=tmp_path)
    assert len(source.splits["train"]) == 5
    _, image, label = source.splits["test"][0]
    assert label == 4
    assert image[0, 0, :4].tolist() == [0, 1, 2, 3]
    assert image[1, 0, 0] == 0


def idx(array):
    shape = np.array(array.shape, ">u4")
    return bytes([0, 0, 8, array.ndim]) + shape.tobytes() + array.tobytes()


def test_idx_files_gzipped_or_not_are_checked(tmp_path, monkeypatch):
    images = np.arange(3 * 784, dtype=np.uint8).reshape(
        3,
        28,
        28,
    )
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
        labels = gzip.compress(idx(np.array([5, 0, 4], np.uint8)))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(labels)
    with refused("train-images-idx3-ubyte has sha256 .*, not ba891046"):
        load("mnist", root=tmp_path)
    monkeypatch.setattr(
        published,
        "checked",
        lambda _, data, __: gzip.decompress(data) if data[0] == 31 else data,
    )
    key, image, label = load("mnist", root=tmp_path).splits["test"][2]
    assert (image == images[2]).all()
    assert label == 4
    assert key == "test-00002"


def test_every_way_that_failed_is_listed_and_success_is_cached(tmp_path):
    sums = {"file": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}  # of b"abc"

    def obtain(ways):
        return published.obtain("letters", published.Published(sums, ways, ()))

    bad = [("here", partial(published.in_folder, tmp_path / "x")), ("there", lambda file: b"abd")]
    with pytest.raises(Unavailable) as caught:
        obtain(bad)
    for part in ("cache", "here: no file or file.gz", "there: file has sha256 a52d159f262b", "Give the folder"):
        assert part in str(caught.value)
    ways = [*bad, ("packed", lambda file: gzip.compress(b"abc"))]
    assert obtain(ways) == {"file": b"abc"}
    assert obtain([]) == {"file": b"abc"}


@pytest.mark.network
def test_mnist_from_where_it_is_published():
    source = load("mnist")
    assert (len(source.splits["train"]), len(source.splits["test"])) == (60000, 10000)


def database(root, files):
    """An LMDB database as LSUN's: each value is the bytes of a picture."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(root), map_size=2**20) as made, made.begin(write=True) as change:
        for number, content in enumerate(files):
            change.put(b"%08x" % number, content)


def webp(colour, size=(12, 8)):
    stored = io.BytesIO()
    Image.new("RGB", size, colour).save(stored, "WEBP", lossless=True)
    return stored.getvalue()


def test_lsun_is_read_from_its_database(tmp_path):
    database(tmp_path / "lsun", [webp((number, 0, 50)) for number in range(20)])
    source = load("lsun", root=tmp_path / "lsun", size=8)
    assert (source.shape, source.labels) == ((3, 8, 8), ())
    assert {split: len(made) for split, made in source.splits.items()} == {"train": 18, "test": 2}
    reds = []
    for made in source.splits.values():
        for index in range(len(made)):
            key, pixels, label = made[index]
            assert label == -1 and (pixels[2] == 50).all()
            reds.append(int(pixels[0, 0, 0]))
            assert key == f"{reds[-1]:08x}"
    assert sorted(reds) == list(range(20))


def test_lsun_leaves_out_what_is_not_a_picture(tmp_path):
    database(tmp_path / "lsun", [webp((9, 9, 9))] * 19 + [b"none"])
    target = str(tmp_path / "packed")
    pack(load("lsun", root=tmp_path / "lsun", size=8), target, shards=1)
    assert sum(split.samples for split in Manifest.load(target).splits.values()) == 19


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not an LMDB database .*give the folder of data.mdb"),
        ([webp((1, 1, 1))], "1 pictures, and at least 2 are needed"),
    ],
)
def test_other_databases_are_refused(tmp_path, content, message):
    if content is not None:
        database(tmp_path / "lsun", content)
    with refused(message):
        load("lsun", root=tmp_path / "lsun", size=8)
    with refused("lsun needs a database and a size"):
        load("lsun", root=tmp_path / "lsun")
