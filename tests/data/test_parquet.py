"""Parquet files, as of Hugging Face's datasets, packed."""

import io
import json
import math
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from naign.cli.data import pack as pack_command
from naign.data.format.audit import verify
from naign.data.format.manifest import Manifest
from naign.data.loader import read_split
from naign.data.sources.catalog import load
from naign.data.sources.source import Source
from naign.errors import InputError, Unavailable

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE = {"_type": "Image"}
CLASSES = {"image": IMAGE, "label": {"names": ["cat", "a/dog"], "_type": "ClassLabel"}}


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 100, 50)).save(stream, "PNG")
    return stream.getvalue()


def table(values: range, features: Any = CLASSES, **columns: Any) -> Any:
    """Pictures whose red is the row's value, as datasets writes them, with other or more columns."""
    content = {"image": pa.array([{"bytes": png(value), "path": None} for value in values], PICTURE)}
    content |= {"label": [value % 2 for value in values]} | columns
    made = pa.table({name: column for name, column in content.items() if column is not None})
    described = json.dumps({"info": {"features": features}})
    return made.replace_schema_metadata({"huggingface": described} if features else {})


def write(file: Path, made: Any, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(made, file, **options)
    return file


def opened(root: Path, **options: Any) -> Source:
    return load("parquet", root=root, **{"size": "8", **options})


def reds(source: Source, split: str) -> list[tuple[int, int]]:
    """The value and the label of each example."""
    made = source.splits[split]
    return [(int(array[0, 0, 0]), label) for _, array, label in map(made.__getitem__, range(len(made)))]


def refused(root: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        opened(root, **options)


def test_a_folder_of_the_hub_with_its_splits_and_names(tmp_path: Path) -> None:
    first = write(tmp_path / "data/train-00000-of-00002.parquet", table(range(30)), row_group_size=7)
    write(tmp_path / "data/train-00001-of-00002.parquet", table(range(30, 40)))
    write(tmp_path / "data/test-00000-of-00001.parquet", table(range(100, 105)))
    source = opened(tmp_path)
    assert source.labels == ("cat", "a/dog") and source.shape == (3, 8, 8) and source.kind == "image"
    assert reds(source, "train") == [(value, value % 2) for value in range(40)]
    assert reds(source, "test") == [(value, value % 2) for value in range(100, 105)]
    packed = str(tmp_path / "packed")
    pack_command("parquet", to=packed, root=tmp_path, size="8", shards=2)
    assert verify(packed, progress=False).samples == 45
    assert Manifest.load(packed).labels == ("cat", "a/dog")
    images, labels = read_split(packed, "train")
    assert sorted(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)) == reds(source, "train")
    few = opened(first)
    assert len(few.splits["train"]) == 27 and len(few.splits["test"]) == 3
    assert sorted(reds(few, "train") + reds(few, "test")) == [(value, value % 2) for value in range(30)]
    assert reds(opened(first, seed=1), "test") != reds(few, "test")
    assert len(load("parquet:5", root=tmp_path, size="8").splits["train"]) == 5


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("latest/validated/train.parquet", "latest/validated/test.parquet"),
        ("contest/a.parquet", "test/a.parquet"),
        ("data/evaluation-0.parquet", "data/validation/0.parquet"),
        ("test/train/x/a.parquet", "train/test/x/a.parquet"),
        ("test/train-00000-of-00001.parquet", "train/my_val.parquet"),
    ],
)
def test_a_files_name_or_else_its_folder_says_its_split(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path / "test" / train, table(range(4)))  # the folder that is given says nothing
    write(tmp_path / "test" / test, table(range(50, 52)))
    source = opened(tmp_path / "test")
    assert reds(source, "train") == [(value, value % 2) for value in range(4)]
    assert reds(source, "test") == [(value, value % 2) for value in range(50, 52)]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (pa.array([["b", "a", "c"][v % 3] for v in range(9)], pa.large_string()), ("a", "b", "c")),
        (pa.array(["x", "y", "x"] * 3).dictionary_encode(), ("x", "y")),
        (pa.array([10, 2, 2] * 3, pa.int8()), ("2", "10")),
        (pa.array([10.0, 2.0, 2.0] * 3), ("2", "10")),  # pandas' integers of a column in which some were missing
        (None, ()),
    ],
)
def test_labels_without_names(tmp_path: Path, column: Any, labels: tuple[str, ...]) -> None:
    made = table(range(9), None, image=pa.array([png(v) for v in range(9)], pa.large_binary()), label=column)
    source = opened(write(tmp_path / "a.parquet", made))
    assert source.labels == labels
    texts = [str(text).removesuffix(".0") for text in column.to_pylist()] if labels else []
    for value, label in reds(source, "train") + reds(source, "test"):
        assert label == (labels.index(texts[value]) if labels else -1)
    assert opened(tmp_path / "a.parquet", label="none").labels == ()


@pytest.mark.parametrize(
    "features",
    [None, [1], {"label": {"names": 3}}],
)
def test_a_description_of_columns_by_another_program(tmp_path: Path, features: Any) -> None:
    write(tmp_path / "part.parquet/a.parquet", table(range(4), features))
    assert opened(tmp_path).labels == ("0", "1")
    texts = table(range(4), label=["cat", "bird", "cat", "cat"])  # a ClassLabel that is stored by name
    assert opened(write(tmp_path / "b.parquet", texts)).labels == ("bird", "cat")


def test_columns_that_are_not_there_or_too_many(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.parquet", table(range(4), None, image=None))
    refused(bare, r"bare.parquet: no column image: choose by --image, and --label or none, among label")
    picture = table(range(4)).column("image")
    two = write(tmp_path / "two.parquet", table(range(4), None, mask=picture, fine=[0, 1, 2, 3]))
    refused(two, "column label holds no pictures: choose one by --image", image="label")
    assert opened(two, image="mask", label="fine").labels == ("0", "1", "2", "3")
    refused(two, "no column size: choose by --image, and --label or none", label="size")
    refused(two, "row 0: .* is not a label", label="mask")
    for options in ({"root": tmp_path}, {"size": "8"}):
        with pytest.raises(InputError, match="parquet needs pictures and their size: add --root FOLDER --size 64"):
            load("parquet", **options)


def test_pictures_that_cannot_be_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cells = [{"bytes": png(value), "path": None} for value in range(300)]
    cells[270]["bytes"] = b"no picture"
    cells[280] = {"bytes": None, "path": "a.png"}
    root = write(tmp_path / "a.parquet", table(range(300), image=pa.array(cells, PICTURE)))
    packed = str(tmp_path / "packed")
    with pytest.raises(InputError, match=r"a.parquet, row 2\d0: .* leave out all such pictures with --broken skip"):
        pack_command("parquet", to=packed, root=root, size="8")
    pack_command("parquet", to=packed, root=root, size="8", broken="skip")
    assert verify(packed, progress=False).samples == 298
    assert "a.parquet, row 270: not a picture that Pillow can read: left out" in caplog.text
    assert "a.parquet, row 280: no bytes; of a path alone nothing is read: left out" in caplog.text


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    for value in (2, -1, None):
        column = pa.array([0, 1, 0, value], pa.int64())
        made = write(tmp_path / "b.parquet", table(range(4), label=column))
        refused(made, f"b.parquet, row 3: {value!r} is not a label: .* or --label none")
    for value in (0.5, math.nan, math.inf):
        made = write(tmp_path / "b.parquet", table(range(4), None, label=[1.0, value, 0.0, 1.0]))
        refused(made, f"b.parquet, row 1: {value} is not a label: move the file away")
    write(tmp_path / "mixed/a.parquet", table(range(4)))
    write(tmp_path / "mixed/b.parquet", table(range(4), label=None))
    refused(tmp_path / "mixed", "mixed: some files have labels and others have none")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        refused(root, "0 pictures in .parquet files, 2 are needed: check the path")
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 no more")
    refused(file, "a.parquet: cannot be read")
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"b"]).buffers())
    refused(write(file, table(range(2), label=bad)), "a.parquet: .*can't decode")
    twice = table(range(2)).append_column("label", pa.array([0, 1]))
    refused(write(file, twice), "a.parquet: cannot be read.*label")
    write(file, table(range(100)))
    monkeypatch.setattr("tempfile.TemporaryFile", partial(open, "/dev/full", "wb"))
    with pytest.raises(Unavailable, match="cannot be read, or copied to a temporary file .*No space left on device"):
        opened(file)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)

    def peak(rows: int) -> int:
        cells = []
        for _ in range(rows):
            stream = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (64, 64, 3), np.uint8)).save(stream, "PNG")
            cells.append({"bytes": stream.getvalue(), "path": None})
        made = table(range(rows), image=pa.array(cells, PICTURE))
        file = write(tmp_path / f"{rows}.parquet", made, row_group_size=100)
        del cells, made
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        opened(file)
        most = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        return most

    assert peak(2048) < 1.3 * peak(512)
