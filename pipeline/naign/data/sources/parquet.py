"""Parquet files, as of Hugging Face's datasets, as a source. Pictures are copied to a temporary file, from which shards
take them in random order.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
    _: str,
    root: Path,
    size: str | int,
    channels: int,
    seed: int,
    skip: bool,
    image: str,
    label: str,
) -> Source:
    """The rows of a .parquet file or of those in a folder; pictures of column `image` ("": `image`), cropped and
    resized as by `folder.from_tree`, and labels of column `label` ("": `label`, if there is one; "none": none).

    The test split is files whose names, or else nearest folders below root, have the word test or validation, or else a
    tenth of the rows, drawn by the seed. With `skip` rows of no picture are left out in packing. Raises InputError that
    names file and row, and Unavailable where the disk is full.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"parquet needs pyarrow ({error}): pip install pyarrow") from None
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
            columns = _columns(table.schema_arrow.names, str(file), image or "image", label)
            names = names or _class_names(table.schema_arrow, columns)
            splits[split] += _rows(str(file), table, columns, names, spool)
        except (OSError, KeyError, UnicodeError, pa.ArrowException) as error:  # KeyError: two columns of one name
            raise unwritten(f"{file}: cannot be read, or copied to a temporary file ({one_line(error)})") from None
    rows = splits["train"] + splits["test"]
    if len(rows) < 2:
        raise InputError(f"{root}: {len(rows)} pictures in .parquet files, 2 are needed: check the path")
    if not splits["train"] or not splits["test"]:
        splits = draw_test(rows, seed)
    texts = {row.label for row in rows}
    labels = names or sorted(texts - {""}, key=lambda text: (parse_number(text), text))
    if labels and not texts <= set(labels):
        what = "some files have labels and others have none, or other names"
        raise InputError(f"{root}: {what}: pack them apart, or --label none")
    made = {}
    for split, group in splits.items():
        make = partial(_make, split, group, labels, form, spool)
        made[split] = Made(length=len(group), make=make, skip=skip)
    return Source(
        name="parquet",
        kind="image",
        shape=form.shape,
        labels=tuple(labels),
        splits=made,
    )


def _make(split: str, rows: list[Row], labels: list[str], form: Form, spool: BinaryIO, index: int) -> Example:
    row = rows[index]
    if not row.size:
        raise BrokenPicture(f"{row.where}: no bytes; of a path alone nothing is read")
    pixels = form.read(os.pread(spool.fileno(), row.size, row.begin), row.where)
    label = labels.index(row.label) if labels else -1
    return f"{split}-{index:07d}", pixels, label


def _rows(file: str, table: Any, columns: list[str], names: list[str], spool: BinaryIO) -> Iterator[Row]:
    """The rows of a file, whose pictures are copied to `spool`."""
    number = 0
    for batch in table.iter_batches(BATCH, columns=columns):
        for record in batch.select(columns).to_pylist():
            where = f"{file}, row {number}"
            data, *values = record.values()
            if isinstance(data, dict):
                data = data.get("bytes")
            if not isinstance(data, bytes | None):
                raise InputError(f"{where}: column {columns[0]} holds no pictures: choose one by --image")
            label = _label(values[0], names, where) if values else ""
            data = data or b""
            yield Row(where, spool.tell(), len(data), label)
            spool.write(data)
            number += 1
    spool.flush()


def _label(value: Any, names: list[str], where: str) -> str:
    """The text of a label, of the `names` if these are not empty."""
    if isinstance(value, float) and value.is_integer():  # pandas' integers of a column in which some are missing
        value = int(value)
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if names or value in (-1, "") or not isinstance(value, (str, int)):
        raise InputError(f"{where}: {value!r} is not a label: move the file away, or --label none")
    return str(value)


def _columns(found: list[str], file: str, image: str, label: str) -> list[str]:
    """The column of pictures and, if there is one, of labels. Raises InputError."""
    columns = [image]
    if label != "none" and (label or "label" in found):
        columns.append(label or "label")
    for name in columns:
        if name not in found:
            listed = printable(", ".join(found), 1000)
            raise InputError(f"{file}: no column {name}: choose by --image, and --label or none, among {listed}")
    return columns


def _class_names(schema: Any, columns: list[str]) -> list[str]:
    """The names of the labels, which are numbers then, if datasets wrote them into the file."""
    with suppress(LookupError, TypeError, ValueError):
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][columns[1]]["names"]
        if isinstance(names, list) and "int" in str(schema.field(columns[1]).type):
            return list(map(str, names))
    return []
