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


def from_tables(
    root: Path,
    *,
    size: str | int,
    channels: int,
    seed: int,
    skip: bool,
    image: str,
    label: str,
) -> Source:
    """The rows of a .parquet file or of those in a folder; pictures of column `image` ("": the only one of pictures),
    cropped and resized as by `folder.from_tree`, and labels of column `label` ("": `label`, if there is one; "none":
    none). The test split is files whose names, or else nearest folders below root, have the word test or validation, or
    else a tenth of the rows, drawn by the seed. With `skip` rows of no picture are left out in packing. Raises
    InputError that names file and row, and Unavailable where the disk is full.
    """
    form = Form.parse(size, channels)
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    names: list[str] = []
    spool = tempfile.TemporaryFile()  # noqa: SIM115  # the examples read it
    for file in filter(Path.is_file, files):
        words = SPLIT.findall("/".join(file.relative_to(root).parts).lower())
        split = "test" if words and words[-1] != "train" else "train"
        try:
            table = parquet.ParquetFile(file)
            columns = _columns(table.schema_arrow, str(file), image, label)
            names = names or _class_names(table.schema_arrow, columns[1:])
            splits[split] += _rows(str(file), table, columns, names, spool)
        except (OSError, KeyError, UnicodeError, pa.ArrowException) as error:  # KeyError: two columns of one name
            raise unwritten(f"{file}: cannot be read, or copied to a temporary file ({one_line(error)})") from None
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
    return Source(
        name="parquet",
        kind="image",
        shape=form.shape,
        labels=tuple(names),
        splits=made_splits,
    )


def _rows(
    file: str,
    table: Any,
    columns: list[str],
    names: list[str],
    spool: BinaryIO,
) -> Iterator[Row]:
    """The rows of a file, whose pictures are copied to `spool`."""
    number = 0
    for batch in table.iter_batches(BATCH, columns=columns):
        for cell, *value in zip(*(column.to_pylist() for column in batch.select(columns)), strict=True):
            where = f"{file}, row {number}"
            data = cell["bytes"] if isinstance(cell, dict) else cell
            label = _label(value[0], names, where) if value else ""
            yield Row(where, spool.tell(), len(data or b""), label)
            spool.write(data or b"")
            number += 1
    spool.flush()


def _label(value: Any, names: list[str], where: str) -> str:
    """The text of a label, of the `names` if these are not empty."""
    if isinstance(value, float) and value.is_integer():  # pandas' integers of a column in which some are missing
        value = int(value)
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if names or value in (None, -1, "") or isinstance(value, float):
        raise InputError(f"{where}: {value!r} is not a label: move the file away, or --label none")
    return str(value)


def _columns(schema: Any, file: str, image: str, label: str) -> list[str]:
    """The column of pictures and, if there is one, of labels. Raises InputError."""
    fields = {field.name: field.type for field in schema}
    for name, kind in fields.items():
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            fields[name] = kind.field("bytes").type
    pictures = [name for name, kind in fields.items() if types.is_binary(kind) or types.is_large_binary(kind)]
    if not image and len(pictures) == 1:
        image = pictures[0]
    listed = printable(", ".join(f"{field.name} ({field.type})" for field in schema), 1000)
    if image not in pictures:
        raise InputError(f"{file}: {len(pictures)} columns of pictures: choose one by --image among {listed}")
    if label == "none" or (not label and "label" not in fields):
        return [image]
    label = label or "label"
    if label not in fields or label in pictures or types.is_nested(fields[label]):
        raise InputError(f"{file}: no column {label} of labels: choose one by --label, or none, among {listed}")
    return [image, label]


def _class_names(schema: Any, label: list[str]) -> list[str]:
    """The names of the labels, which are numbers then, if datasets wrote them into the file."""
    with suppress(AttributeError, LookupError, TypeError, ValueError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features[label[0]]["names"]]
        if types.is_integer(schema.field(label[0]).type) and len(set(names)) == len(names):
            return names
    return []
