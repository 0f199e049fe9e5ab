"""Indexing tars that others wrote, and what is refused of them."""

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format.audit import verify
from naign.data.format.indexing import index
from naign.data.format.manifest import Manifest
from naign.data.format.survey import KEPT
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.errors import InputError
from tests.data.numbered import numbered

PNG = encode(np.arange(16, dtype=np.uint8).reshape(1, 4, 4), "png")
Members = list[tuple[str, bytes]]


def write(file: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def refuse(folder: Path, message: str) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=message):
        index(str(folder), progress=False)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert before == {name: data for name, data in after.items() if not name.endswith(KEPT)}
    assert f"index{KEPT}" not in after


def test_an_index_of_our_own_tars_is_the_one_that_pack_wrote(packed: str, tmp_path: Path) -> None:
    other = tmp_path / "tars"
    other.mkdir()
    for tar in Path(packed).glob("*.tar"):
        shutil.copy(tar, other)
    made = index(str(other), name="numbered", labels=("even", "odd"), progress=False)
    assert made == replace(Manifest.load(packed), dealt=False) == Manifest.load(str(other))
    for table in Path(packed).glob("*.npy"):
        assert table.read_bytes() == (other / table.name).read_bytes()
    assert verify(str(other), progress=False).samples == 28


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers(tmp_path: Path, format: int) -> None:
    long = "folder/" + "x" * 90 + "/" + "y" * (40 if format == tarfile.USTAR_FORMAT else 120)
    members = [
        ("__meta__/notes.txt", b"not a sample"),
        ("a/0001.PNG", PNG),
        ("a/0001.cls", b"0"),
        ("a/0001.json", b"{}"),
        ("a/0002.json", b"{}"),
        ("a/0002.png", PNG),
        ("a/0002.cls", b"0"),
        ("a/0002.seg.png", b"another member"),
        (f"{long}.cls", b"1"),
        (f"{long}.png", PNG),
        ("README", b"no suffix: not a sample"),
    ]
    write(tmp_path / "train.tar", members, format)
    manifest = index(str(tmp_path), progress=False)
    assert manifest.shape == (1, 4, 4) and manifest.labels == ("0", "1") and set(manifest.splits) == {"train"}
    images, labels = read_split(str(tmp_path), "train")
    assert images.tolist() == [[np.arange(16).reshape(4, 4).tolist()]] * 3 and labels.tolist() == [0, 0, 1]


def test_points_and_arrays(tmp_path: Path) -> None:
    for name, array in (("points", np.arange(2, dtype=np.float32)), ("images", np.zeros((3, 4, 5), np.uint8))):
        (tmp_path / name).mkdir()
        with TarWriter(str(tmp_path / name / "train.tar"), encoder=False) as writer:
            writer.write({"__key__": "a", "npy": encode(array, "npy")})
        assert index(str(tmp_path / name), progress=False).shape == array.shape
        assert (read_split(str(tmp_path / name), "train")[0][0].numpy() == array).all()


def stored(mode: str, form: str) -> bytes:
    """A picture of 4 x 4 pixels of the value 128."""
    stream = io.BytesIO()
    Image.new("L", (4, 4), 128).convert(mode).save(stream, form)
    return stream.getvalue()


def saved(*shape: int) -> bytes:
    return encode(np.full(shape, 128, np.uint8), "npy")


@pytest.mark.parametrize("check", [None, 0])
def test_what_is_indexed_is_read(tmp_path: Path, check: int | None) -> None:
    """Grey samples beside colour ones among them, however they are stored."""
    forms = [("png", stored(mode, "PNG")) for mode in ("L", "RGB", "LA", "P")]
    forms += [("jpg", stored(mode, "JPEG")) for mode in ("L", "RGB", "CMYK")]
    forms += [("webp", stored("RGB", "WEBP")), ("npy", saved(1, 4, 4)), ("npy", saved(3, 4, 4))]
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(np.full((1, 4, 4), 128, np.uint8)))
    forms.append(("npy", stream.getvalue()))
    write(tmp_path / "train.tar", [(f"{number:02d}.{suffix}", data) for number, (suffix, data) in enumerate(forms)])
    assert index(str(tmp_path), sample_check=check, progress=False).shape == (3, 4, 4)
    assert verify(str(tmp_path), progress=False).samples == len(forms)
    images = read_split(str(tmp_path), "train")[0].numpy()
    assert images.shape == (len(forms), 3, 4, 4) and (abs(images.astype(int) - 128) < 3).all()
    larger = read_split(DataConfig(path=str(tmp_path), size="8"), "train")[0].numpy()
    assert larger.shape == (len(forms), 3, 8, 8) and (abs(larger.astype(int) - 128) < 3).all()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.npy", saved(4, 4, 4))], "key a: the .npy has 4 channels, not 1 or 3"),
        ([("a.txt", b"x")], "train.tar, key a: no member ends in png or"),
        ([("a.png", PNG), ("b.cls", b"1")], "train.tar, key b: no member ends in png or"),
        ([("a.png", PNG), ("a.png", PNG)], r"train.tar, key a: two members end in \.png"),
        ([("a.png", PNG), ("b.png", PNG), ("a.cls", b"1")], "train.tar, key a: also in train.tar"),
        ([("a.png", PNG), ("b.png", PNG[:40])], r"train.tar, key b: the \.png cannot be decoded"),
        ([("a.png", PNG), ("b.npy", encode(np.zeros(4, np.float32), "npy"))], "key b: point .4,., others are image"),
        (
            [("a.npy", encode(np.zeros((3, 0, 5), np.uint8), "npy"))],
            "no values, its shape is .3, 0, 5",
        ),
        ([("a.png", PNG), ("a.cls", b"cat")], "label 'cat' is none"),
        (
            [("a.png", PNG), ("a.cls", b"200000000")],
            "key a: label '200000000' is none that .cls can hold, a number below 1000000",
        ),
        ([("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG)], "key b: no .cls, unlike others"),
        ([("a.npy", encode(np.zeros((4, 4), np.float32), "npy"))], "float32 of .*images are uint8"),
        (
            [("a.npy", encode(np.zeros((1, 4, 4), np.uint8), "npy")[:-3])],
            "train.tar, key a: the .npy cannot be decoded",
        ),
        ([("README", b"x")], "train.tar: holds no samples"),
    ],
)
def test_samples_that_no_index_can_name(tmp_path: Path, members: Members, message: str) -> None:
    write(tmp_path / "train.tar", members)
    refuse(tmp_path, message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:700], "truncated or no tar"),
        (lambda data: data[:2048], "ends in the middle: no end-of-archive mark"),
        (lambda data: data + data, "more data behind the end of the archive"),
        (lambda _: b"no tar at all" * 100, "truncated or no tar"),
        (lambda _: b"", "train.tar"),
        (lambda data: __import__("gzip").compress(data), "truncated or no tar"),
    ],
)
def test_files_that_are_no_whole_tar(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = tmp_path / "train.tar"
    write(file, [("a.png", PNG), ("b.png", PNG)])
    file.write_bytes(damage(file.read_bytes()))
    refuse(tmp_path, message)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        picture = tarfile.TarInfo("a.png")
        picture.size = len(PNG)
        tar.addfile(picture, io.BytesIO(PNG))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = kind, "a.png"
        tar.addfile(link)
    refuse(tmp_path, r"train.tar: b.png is a link or sparse")


def test_a_key_in_two_shards_and_names_of_splits(tmp_path: Path) -> None:
    write(tmp_path / "x-train-0.tar", [("a.png", PNG)])
    write(tmp_path / "x-train-1.tar", [("a.png", PNG)])
    refuse(tmp_path, r"x-train-1.tar, key a: also in x-train-0.tar")
    (tmp_path / "x-train-1.tar").rename(tmp_path / "x-val-1.tar")
    with pytest.raises(InputError, match=r"none of its 2 tars .* is left for --train 'y-\*\.tar'"):
        index(str(tmp_path), train="y-*.tar", progress=False)
    assert set(index(str(tmp_path), train="x-train*.tar", progress=False).splits) == {"train"}
    with pytest.raises(InputError, match="index.json is there already: .*--force"):
        index(str(tmp_path), progress=False)
    made = index(str(tmp_path), force=True, progress=False)
    assert {name: split.samples for name, split in made.splits.items()} == {"train": 1, "test": 1}
    with pytest.raises(InputError, match=r"1 label names, but labels up to 1"):
        for file in tmp_path.glob("*.tar"):
            write(file, [("a.png", PNG), ("a.cls", b"1")])
        index(str(tmp_path), labels=("only",), force=True, progress=False)


@pytest.mark.parametrize("first", [False, True])
def test_broken_pictures_may_be_kept(tmp_path: Path, first: bool) -> None:
    members = [("a.png", PNG), ("b.png", PNG[:40]), ("c.png", PNG)]
    write(tmp_path / "train.tar", members[1:] if first else members)
    refuse(tmp_path, r"key b: the \.png cannot be decoded")
    assert index(str(tmp_path), keep_broken=True, progress=False).split("train").samples == 3 - first
    with pytest.raises(InputError, match=r"key b: the \.png cannot be decoded"):
        read_split(str(tmp_path), "train")


def test_a_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.tar there"):
        index(str(tmp_path), progress=False)


def test_a_page_table_of_another_shard_is_found(packed: str) -> None:
    folder = Path(packed)
    shutil.copy(folder / "train-00001.pages.npy", folder / "train-00002.pages.npy")
    with pytest.raises(InputError, match=r"train-00002\.pages\.npy: its SHA-256 is not the one in index.json"):
        verify(packed, progress=False)
    with pytest.raises(InputError, match=r"train-00002\.pages\.npy: its SHA-256 is not the one in index.json"):
        read_split(packed, "train")
    (folder / "train-00002.pages.npy").unlink()
    with pytest.raises(InputError, match=r"train-00002\.pages\.npy: no such file"):
        read_split(packed, "train")
    pack(numbered(), packed, shards=4, progress=False)
    assert verify(packed, progress=False).samples == 28


def test_nothing_but_broken_pictures(tmp_path: Path) -> None:
    write(tmp_path / "train.tar", [("a.png", PNG[:40]), ("b.png", PNG[:50])])
    with pytest.raises(InputError, match="none of its samples can be decoded"):
        index(str(tmp_path), keep_broken=True, progress=False)
