"""Parquet files, as of Hugging Face's datasets, as a source. Pictures are copied to a temporary file, from which shards
take them in random order.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import parquet, types

from naign.data.format.labels import parse_number
from naign.data.sources.folder import Form
from naign.data.sources.source import BrokenPicture, Example, Made, Source, draw_test
from naign.errors import InputError, one_line, printable, unwritten

SPLIT = re.compile(r"(?<![a-z])(train|test|val)(?:ing|id|idation)?(?![a-z])")  # in names of files and folders
BATCH = 256  # rows of a file that are read at once


class Row(NamedTuple):
    """One picture."""

    where: str  # file and row, for messages
    begin: int  # in the temporary file
    size: int
    label: str  # "": none


class Columns(NamedTuple):
    """Where a file has pictures and labels."""

    image: str
    label: str  # "": none
    names: list[str]  # of a ClassLabel, which holds numbers; [] of other labels


def from_tables(root: Path, *, size: str | int, channels: int, seed: int, skip: bool, image: str, label: str) -> Source:
    """The rows of a .parquet file or of those in a folder; pictures of column `image` ("": the only one of pictures),
    cropped and resized as by `folder.from_tree`, and labels of column `label` ("": the only ClassLabel, or `label`;
    "none": none). The test split is files whose names, or else nearest folders below root, have the word test or
    validation, or else a tenth of the rows, drawn by the seed. With `skip` rows of no picture are left out in packing.
    Raises InputError that names file and row, and Unavailable where the disk is full.
    """
    form = Form.parse(size, channels)
    files = [root]
    if not root.is_file():
        files = sorted(file for file in root.rglob("*.parquet") if file.is_file())
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    names: list[str] = []
    spool = tempfile.TemporaryFile()  # noqa: SIM115  # the examples read it
    try:
        for file in files:
            words = SPLIT.findall("/".join(file.relative_to(root).parts).lower())
            split = "test" if words and words[-1] != "train" else "train"
            opened, columns = _open(file, image, label)
            names = names or columns.names
            splits[split] += _rows(file, opened, columns, spool)
        spool.flush()
    except OSError as error:
        raise unwritten(f"{tempfile.gettempdir()}: {error.strerror}: free some, or set TMPDIR") from None
    rows = splits["train"] + splits["test"]
    if len(rows) < 2:
        raise InputError(f"{root}: {len(rows)} pictures in .parquet files, 2 are needed: check the path")
    if len(rows) in map(len, splits.values()):
        train, test = draw_test(len(rows), seed)
        splits = {"train": [rows[number] for number in train], "test": [rows[number] for number in test]}
    texts = {row.label for row in rows}
    names = names or sorted(texts - {""}, key=lambda text: (parse_number(text), text))
    if names and not texts <= set(names):
        what = "some files have labels and others have none, or other names"
        raise InputError(f"{root}: {what}: pack them apart, or --label none")
    numbers = {name: number for number, name in enumerate(names)}

    def made(split: str) -> Made:
        def make(index: int) -> Example:
            row = splits[split][index]
            if not row.size:
                raise BrokenPicture(f"{row.where}: no bytes; of a path alone nothing is read")
            pixels = form.read(os.pread(spool.fileno(), row.size, row.begin), row.where)
            return f"{split}-{index:07d}", pixels, numbers.get(row.label, -1)

        return Made(length=len(splits[split]), make=make, skip=skip)

    made_splits = {split: made(split) for split in splits}
    return Source(name="parquet", kind="image", shape=form.shape, labels=tuple(names), splits=made_splits)


def _open(file: Path, image: str, label: str) -> tuple[Any, Columns]:
    """A Parquet file, and which of its columns are read."""
    try:
        opened = parquet.ParquetFile(file)
        return opened, _columns(opened.schema_arrow, str(file), image, label)
    except (OSError, KeyError, pa.ArrowException) as error:  # KeyError: two columns of one name
        raise InputError(f"{file}: cannot be read ({one_line(error)}): write or download it again") from None


def _rows(file: Path, opened: Any, columns: Columns, spool: BinaryIO) -> Iterator[Row]:
    """The rows of a file, whose pictures are copied to `spool`."""
    number = 0
    batches = opened.iter_batches(BATCH, columns=[name for name in (columns.image, columns.label) if name])
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            cells = batch[columns.image].to_pylist()
            values = batch[columns.label].to_pylist() if columns.label else [None] * len(cells)
        except (OSError, KeyError, UnicodeError, pa.ArrowException) as error:
            raise InputError(f"{file}: cannot be read ({one_line(error)}): write or download it again") from None
        for cell, value in zip(cells, values, strict=True):
            data = cell["bytes"] if isinstance(cell, dict) else cell
            where = f"{file}, row {number}"
            begin = spool.tell()
            spool.write(data or b"")
            yield Row(where, begin, len(data or b""), _label(value, columns, where))
            number += 1


def _label(value: Any, columns: Columns, where: str) -> str:
    if not columns.label:
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas' integers of a column in which some are missing
        value = int(value)
    if columns.names and isinstance(value, int) and 0 <= value < len(columns.names):
        return columns.names[value]
    if columns.names or value in (None, -1, "") or isinstance(value, float):
        raise InputError(f"{where}: {value!r} is no label of {columns.label}: move the file away, or --label none")
    return str(value)


def _columns(schema: Any, file: str, image: str, label: str) -> Columns:
    """The columns to read. Raises InputError where they are missing, or there is a choice."""
    features: dict[str, Any] = {}  # datasets' description of the columns, if it wrote the file
    with suppress(AttributeError, LookupError, TypeError, ValueError):
        described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        features = {name: feature for name, feature in described.items() if isinstance(feature, dict)}
    kinds = {name: feature.get("_type") for name, feature in features.items()}
    pictures = [field.name for field in schema if _holds_bytes(field.type)]
    pictures = [name for name in pictures if kinds.get(name) == "Image"] or pictures
    fields = printable(", ".join(f"{field.name} ({field.type})" for field in schema), 1000)
    image = _choose(f"{file}: columns of pictures", "--image", image, pictures, fields)
    texts = [field.name for field in schema if _is_label(field.type)]
    classes = [name for name in texts if kinds.get(name) == "ClassLabel"] or [name for name in texts if name == "label"]
    if label == "none" or not (label or classes):
        return Columns(image, "", [])
    label = _choose(f"{file}: columns of labels", "--label, or none", label, texts if label else classes, fields)
    names = features.get(label, {}).get("names")
    if not isinstance(names, list) or not types.is_integer(schema.field(label).type):
        return Columns(image, label, [])
    if len(set(names)) < len(names):
        raise InputError(f"{file}: a name of the ClassLabel {label} stands twice: rename it, or --label none")
    return Columns(image, label, [str(name) for name in names])


def _choose(what: str, option: str, given: str, columns: list[str], fields: str) -> str:
    """The column that was given, or else the only one."""
    if given in columns:
        return given
    if len(columns) == 1 and not given:
        return columns[0]
    if not columns:
        raise InputError(f"{what}: none among {fields}")
    raise InputError(f"{what}: choose one of {', '.join(columns)} by {option}")


def _holds_bytes(kind: Any) -> bool:
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_label(kind: Any) -> bool:
    kinds = (types.is_integer, types.is_floating, types.is_string, types.is_large_string, types.is_dictionary)
    return any(is_kind(kind) for is_kind in kinds)
