"""Parquet files and folders of Hugging Face's datasets, packed."""

import io
import json
import math
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from naign.cli.data import pack as pack_command
from naign.data.format.audit import verify
from naign.data.format.manifest import Manifest
from naign.data.loader import read_split
from naign.data.sources.catalog import load
from naign.data.sources.source import Source
from naign.errors import InputError, Unavailable

pa = pytest.importorskip("pyarrow")
from pyarrow import ipc, parquet  # noqa: E402

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "a/dog"], "_type": "ClassLabel"}}


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 100, 50)).save(stream, "PNG")
    return stream.getvalue()


def table(values: range, features: dict[str, Any] | None = CLASSES, **columns: Any) -> Any:
    """Pictures whose red is the row's value, as datasets writes them, with other or more columns."""
    content = {"image": pa.array([{"bytes": png(value), "path": None} for value in values], PICTURE)}
    content |= {"label": [value % 2 for value in values]} | columns
    made = pa.table({name: column for name, column in content.items() if column is not None})
    return made.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
    )


def write(file: Path, made: Any, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(made, file, **options)
    return file


def reds(source: Source, split: str) -> list[tuple[int, int]]:
    """The value and the label of each example."""
    return [(int(array[0, 0, 0]), label) for _, array, label in source.splits[split]]


def opened(root: Path, **options: Any) -> Source:
    return load("parquet", root=root, size="8", **options)


def test_a_folder_of_the_hub_with_its_splits_and_names(tmp_path: Path) -> None:
    write(tmp_path / "data/train-00000-of-00002.parquet", table(range(30)), row_group_size=7)
    write(tmp_path / "data/train-00001-of-00002.parquet", table(range(30, 40)))
    write(tmp_path / "data/test-00000-of-00001.parquet", table(range(100, 105)))
    source = opened(tmp_path)
    assert source.labels == ("cat", "a/dog") and source.shape == (3, 8, 8) and source.kind == "image"
    assert reds(source, "train") == [(value, value % 2) for value in range(40)]
    assert reds(source, "test") == [(value, value % 2) for value in range(100, 105)]
    pack_command("parquet", to=str(tmp_path / "packed"), root=tmp_path, size="8", shards=2)
    assert verify(str(tmp_path / "packed"), progress=False).samples == 45
    assert Manifest.load(str(tmp_path / "packed")).labels == ("cat", "a/dog")
    images, labels = read_split(str(tmp_path / "packed"), "train")
    assert sorted(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)) == reds(source, "train")
    few = opened(tmp_path / "data/train-00000-of-00002.parquet")
    assert len(few.splits["train"]) == 27 and len(few.splits["test"]) == 3
    assert sorted(reds(few, "train") + reds(few, "test")) == [(value, value % 2) for value in range(30)]
    assert reds(opened(tmp_path / "data/train-00000-of-00002.parquet", seed=1), "test") != reds(few, "test")
    assert len(load("parquet:5", root=tmp_path, size="8").splits["train"]) == 5


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("latest/validated/train.parquet", "latest/validated/test.parquet"),
        ("contest/a.parquet", "test/a.parquet"),
        ("data/evaluation-0.parquet", "data/validation/0.parquet"),
        ("train/sub/x/a.parquet", "test/sub/x/a.parquet"),
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


def test_a_name_of_two_classes_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "cat"], "_type": "ClassLabel"}}
    with pytest.raises(InputError, match=r"names of the ClassLabel label stand twice, \['cat'\]: rename"):
        opened(write(tmp_path / "a.parquet", table(range(4), features, label=[9, 9, 9, 9])))


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    for split, values in (("train", range(20)), ("validation", range(50, 54))):
        (tmp_path / split).mkdir()
        for name in ("data-00000-of-00001.arrow", "cache-1f2e.arrow"):  # the second is what its `map` leaves there
            with ipc.new_stream(tmp_path / split / name, table(values).schema) as stream:
                stream.write_table(table(values), max_chunksize=6)
    source = opened(tmp_path)
    assert len(source.splits["train"]) == 20 and reds(source, "test") == [(v, v % 2) for v in range(50, 54)]


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (pa.array([["b", "a", "c"][v % 3] for v in range(9)], pa.large_string()), ("a", "b", "c")),
        (pa.array(["x", "y", "x"] * 3).dictionary_encode(), ("x", "y")),
        (pa.array([10, 2, 2] * 3, pa.int8()), ("2", "10")),
        (None, ()),
    ],
)
def test_labels_without_names(tmp_path: Path, column: Any, labels: tuple[str, ...]) -> None:
    made = table(range(9), None, image=pa.array([png(v) for v in range(9)], pa.large_binary()), label=column)
    source = opened(write(tmp_path / "a.parquet", made))
    assert source.labels == labels
    texts = column.to_pylist() if labels else []
    for value, label in reds(source, "train") + reds(source, "test"):
        assert label == (labels.index(str(texts[value])) if labels else -1)
    assert opened(tmp_path / "a.parquet", label="none").labels == ()


def test_labels_as_floats_are_whole_or_refused(tmp_path: Path) -> None:
    """As pandas writes integers of a column in which some were missing."""
    source = opened(write(tmp_path / "a.parquet", table(range(9), None, label=[10.0, 2.0, 2.0] * 3)))
    assert source.labels == ("2", "10") and (0, 1) in reds(source, "train") + reds(source, "test")
    for value in (0.5, math.nan, math.inf):
        made = table(range(4), None, label=[1.0, value, 0.0, 1.0])
        with pytest.raises(InputError, match=f"b.parquet, row 1: {value} is no label of label: move the file away"):
            opened(write(tmp_path / "b.parquet", made))


@pytest.mark.parametrize(
    "features",
    [None, [1], {"label": "x"}, {"label": {"_type": "ClassLabel", "names": None}}, {"label": {"names": 3}}],
)
def test_a_description_of_columns_by_another_program(tmp_path: Path, features: Any) -> None:
    made = table(range(4)).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    assert opened(write(tmp_path / "part.parquet/a.parquet", made).parent.parent).labels == ("0", "1")
    texts = table(range(4), label=["cat", "bird", "cat", "cat"])  # a ClassLabel that is stored by name
    assert opened(write(tmp_path / "b.parquet", texts)).labels == ("bird", "cat")


def test_columns_that_are_not_there_or_too_many(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.parquet", table(range(4), None, image=None))
    with pytest.raises(InputError, match=r"bare.parquet: no columns of pictures.*: its columns are label \(int64\)"):
        opened(bare)
    picture = table(range(4)).column("image")
    two = write(tmp_path / "two.parquet", table(range(4), None, mask=picture, fine=[0, 1, 2, 3]))
    with pytest.raises(InputError, match="two.parquet: 2 columns of pictures.*: choose one of image, mask by --image"):
        opened(two)
    with pytest.raises(InputError, match="no column label of pictures.*: choose one of image, mask by --image"):
        opened(two, image="label")
    assert opened(two, image="mask", label="fine").labels == ("0", "1", "2", "3")
    with pytest.raises(InputError, match="no column size of labels: choose one of label, fine by --label, or none"):
        opened(two, image="mask", label="size")
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel"}, "fine": {"_type": "ClassLabel"}}
    both = write(tmp_path / "both.parquet", table(range(4), features, sound=picture, fine=[0, 1, 2, 3]))
    with pytest.raises(InputError, match="2 columns of labels: choose one of label, fine by --label, or none"):
        opened(both)  # of the columns with bytes, one alone is called an Image
    with pytest.raises(InputError, match="digits does not take --image: leave it out"):
        load("digits", image="a")
    for options in ({"root": tmp_path}, {"size": "8"}):
        with pytest.raises(InputError, match="parquet needs pictures and their size: add --root FOLDER --size 64"):
            load("parquet", **options)


def test_rows_that_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [{"bytes": png(v), "path": None} for v in range(300)]
    cells[270], cells[280] = {"bytes": b"no picture", "path": None}, {"bytes": None, "path": "a.png"}
    broken = write(tmp_path / "a.parquet", table(range(300), image=pa.array(cells, PICTURE)))
    with pytest.raises(
        InputError, match=r"a.parquet, row 270: no picture .*: repair it, or pass over .* --broken skip"
    ):
        opened(broken)
    source = opened(broken, skip=True)
    assert sum(map(len, source.splits.values())) == 298
    assert "a.parquet, row 280: no bytes; of a path alone nothing is read: passed over" in caplog.text
    columns = [pa.array([0, 1, 0, label], pa.int64()) for label in (2, -1, None)] + [pa.array(["a", "b", "a", ""])]
    for column in columns:
        label = column[3].as_py()
        with pytest.raises(InputError, match=f"b.parquet, row 3: {label!r} is no label of label: .* or --label none"):
            opened(write(tmp_path / "b.parquet", table(range(4), label=column)))

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageOps, "fit", full)
    with pytest.raises(InputError, match="too little memory to decode a picture"):
        opened(broken, skip=True)
    monkeypatch.undo()
    write(tmp_path / "mixed/a.parquet", table(range(4)))
    write(tmp_path / "mixed/b.parquet", table(range(4), label=None))
    with pytest.raises(InputError, match="mixed: some files have labels and others have none"):
        opened(tmp_path / "mixed")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 no more")
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            opened(tmp_path / name)
        (tmp_path / name).unlink()
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="0 pictures in .parquet and .arrow files, 2 are needed: check the path"):
            opened(root)
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"b"]).buffers())
    twice = table(range(2)).append_column("label", pa.array([0, 1]))
    for made, why in ((table(range(2), label=bad), "can't decode"), (twice, "label. exists 2 times")):
        with pytest.raises(InputError, match=f"c.parquet: .*{why}"):
            opened(write(tmp_path / "c.parquet", made))
        (tmp_path / "c.parquet").unlink()
    write(tmp_path / "b.parquet", table(range(100)))

    monkeypatch.setattr("tempfile.TemporaryFile", partial(open, "/dev/full", "wb"))
    with pytest.raises(Unavailable, match="No space left on device: free some, or set TMPDIR"):
        opened(tmp_path / "b.parquet")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)

    def peak(rows: int) -> int:
        cells = []
        for _ in range(rows):
            stream = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (64, 64, 3), np.uint8)).save(stream, "PNG")
            cells.append({"bytes": stream.getvalue(), "path": None})
        file = write(
            tmp_path / f"{rows}.parquet", table(range(rows), image=pa.array(cells, PICTURE)), row_group_size=100
        )
        del cells
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        load("parquet", root=file, size="64")
        most = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        return most

    assert peak(2048) < 1.3 * peak(512)
