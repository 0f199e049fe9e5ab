"""Parquet files and folders of Hugging Face's datasets as a source. Batches of rows are decoded into a temporary file,
from which shards take them in random order.
"""

import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from joblib import cpu_count
from pyarrow import ipc, parquet, types

from naign.data.format.labels import parse_number
from naign.data.order import shuffled
from naign.data.resize import parse_size
from naign.data.sources.folder import TEST_SHARE, fitted
from naign.data.sources.source import Example, Made, Source
from naign.errors import InputError, one_line, printable, require, unwritten

log = logging.getLogger(__name__)

BINARY = (types.is_binary, types.is_large_binary)
TEXTS = (types.is_integer, types.is_floating, types.is_string, types.is_large_string, types.is_dictionary)  # of labels
SPLIT = re.compile(r"(?<![a-z])(train|test|val)(?:ing|id|idation)?(?![a-z])")  # in names of files and folders
BATCH = 256  # rows of a Parquet file that are decoded at once


def from_tables(root: Path, *, size: str | int, channels: int, seed: int, skip: bool, image: str, label: str) -> Source:
    """The rows of a .parquet file, or of the .parquet files and .arrow streams in a folder; pictures of column `image`
    ("": the only one of pictures), cropped and resized as by `folder.from_tree`, and labels of column `label` ("": the
    only ClassLabel, or `label`; "none": none). The test split is files whose names, or else nearest folders below root,
    have the word test or validation, or else a tenth of the rows, drawn by the seed. `skip` leaves out what is no
    picture. Raises InputError that names file and row, and Unavailable where the disk is full.
    """
    height, width = parse_size(str(size), "--size")
    files = [root] if root.is_file() else sorted([*root.rglob("*.parquet"), *root.rglob("*.arrow")])
    files = [file for file in files if not (file.is_dir() or file.name.startswith("cache-"))]  # of Spark; of a map
    rows = {"train": list[int](), "test": list[int]()}
    numbers, texts, names = list[int](), dict[str, int](), list[str]()
    try:
        with tempfile.TemporaryFile() as spool, ThreadPool(cpu_count()) as pool:
            decode = partial(pool.map, partial(_decode, size=(width, height), channels=channels))
            for file in files:
                words = SPLIT.findall("/".join(file.relative_to(root).parts).lower())
                split = rows["test" if words and words[-1] != "train" else "train"]
                for pixels, text in _rows(file, image, label, names, decode, skip):
                    spool.write(pixels)
                    split.append(len(numbers))
                    numbers.append(texts.setdefault(text, len(texts)))
            count = len(numbers)
            require((count > 1, f"{root}: {count} pictures in .parquet and .arrow files, 2 are needed: check the path"))
            spool.flush()
            pictures = np.memmap(spool, np.uint8, "r", shape=(count, channels, height, width))
    except OSError as error:
        raise unwritten(f"{tempfile.gettempdir()}: {error.strerror}: free some, or set TMPDIR") from None
    if not all(rows.values()):
        order, few = shuffled(count, seed), max(1, round(TEST_SHARE * count))
        rows = {"train": sorted(order[few:]), "test": sorted(order[:few])}
    labels = tuple(names) or tuple(sorted(texts.keys() - {""}, key=lambda text: (parse_number(text), text)))
    partly = f"{root}: some files have labels and others have none, or other names: pack them apart, or --label none"
    require((not labels or texts.keys() <= set(labels), partly))
    classes = [labels.index(text) if labels else -1 for text in texts]

    def make(split: str, index: int) -> Example:
        row = rows[split][index]
        return f"{split}-{index:07d}", pictures[row], classes[numbers[row]]

    made = {split: Made(length=len(rows[split]), make=partial(make, split)) for split in rows}
    return Source(name="parquet", kind="image", shape=(channels, height, width), labels=labels, splits=made)


def _rows(
    file: Path, image: str, label: str, names: list[str], decode: Callable[[Any], Any], skip: bool
) -> Iterator[tuple[bytes, str]]:
    """Pixels and label of each row, "" without; a ClassLabel's names are added to `names`, if that is empty."""
    is_stream, row = file.suffix == ".arrow", -1
    try:
        opened = ipc.open_stream(file) if is_stream else parquet.ParquetFile(file)
        image, label, classes = _columns(opened.schema if is_stream else opened.schema_arrow, str(file), image, label)
        names += [] if names else classes
        for batch in opened if is_stream else opened.iter_batches(BATCH, columns=[image, label] if label else [image]):
            values = batch[label].to_pylist() if label else [""] * len(batch)
            for value, (pixels, problem) in zip(values, decode(batch[image].to_pylist()), strict=True):
                row += 1
                if problem and skip:
                    log.warning("%s, row %d: %s: passed over", file, row, problem)
                    continue
                value = int(value) if isinstance(value, float) and value.is_integer() else value
                bare = value in (None, -1, "") or isinstance(value, float)
                bare = bare or (bool(classes) and not 0 <= value < len(classes))
                apart = f"{value!r} is no label of {label}: move the file away, or --label none"
                repair = "repair it, or pass over such rows with --broken skip"
                require((not problem, f"{file}, row {row}: {problem}: {repair}"))
                require((not (label and bare), f"{file}, row {row}: {apart}"))
                yield pixels, classes[value] if classes else str(value)
    except (OSError, KeyError, UnicodeError, pa.ArrowException) as error:  # KeyError: two columns of one name
        raise InputError(f"{file}: cannot be read ({one_line(error)}): write or download it again") from None


def _columns(schema: Any, file: str, image: str, label: str) -> tuple[str, str, list[str]]:
    """The columns of pictures and of labels ("": none), and the names of a ClassLabel."""
    features = dict[str, Any]()  # datasets' description of the columns, if it wrote the file
    with suppress(AttributeError, LookupError, TypeError, ValueError):
        described = json.loads(schema.metadata[b"huggingface"])["info"]["features"].items()
        features = {name: feature for name, feature in described if isinstance(feature, dict)}
    kinds = {name: feature.get("_type") for name, feature in features.items()}
    inner = {field.name: field.type for field in schema}
    for name, kind in inner.items():
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            inner[name] = kind.field("bytes").type
    pictures = [name for name, kind in inner.items() if any(holds(kind) for holds in BINARY)]
    pictures = [name for name in pictures if kinds.get(name) == "Image"] or pictures
    texts = [name for name, kind in inner.items() if any(holds(kind) for holds in TEXTS)]
    classes = [name for name in texts if kinds.get(name) == "ClassLabel"] or [name for name in texts if name == "label"]
    fields = printable(", ".join(f"{field.name} ({field.type})" for field in schema), 1000)

    def choose(what: str, option: str, given: str, columns: list[str]) -> str:
        problem = f"no column {given} of {what}" if given else f"{len(columns) or 'no'} columns of {what}"
        remedy = f"choose one of {', '.join(columns)} by {option}" if columns else f"its columns are {fields}"
        require((given in columns if given else len(columns) == 1, f"{file}: {problem}: {remedy}"))
        return given or columns[0]

    image = choose("pictures, binary or with bytes", "--image", image, pictures)
    unlabelled = label == "none" or not (label or classes)
    label = "" if unlabelled else choose("labels", "--label, or none", label, texts if label else classes)
    names = features.get(label, {}).get("names")
    classes = [*map(str, names)] if isinstance(names, list) and types.is_integer(inner[label]) else []
    twice = [name for name, count in Counter(classes).items() if count > 1]
    require((not twice, f"{file}: names of the ClassLabel {label} stand twice, {twice[:3]}: rename, or --label none"))
    return image, label, classes


def _decode(cell: Any, size: tuple[int, int], channels: int) -> tuple[bytes, str]:
    """The pixels (C, H, W) of a picture, and why there are none, or ""."""
    data = cell["bytes"] if isinstance(cell, dict) else cell
    try:
        require((data, "no bytes; of a path alone nothing is read"))
        pixels = np.asarray(fitted(data, size, channels))
    except InputError as error:
        require((not isinstance(error.__context__, MemoryError), "too little memory to decode a picture: free some"))
        return b"", str(error)
    return (pixels if channels == 1 else pixels.transpose(2, 0, 1)).tobytes(), ""
