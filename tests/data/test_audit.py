"""Checking a packed data set against its index."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from naign.data.decode import encode
from naign.data.format.audit import verify
from naign.data.format.writer import pack
from naign.data.loader import read_split
from tests.data.numbered import numbered, replaced, rewrite
from tests.refused import refused


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


def spoil(file):
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)


def swap_table(file):
    file.with_suffix(".pages.npy").write_bytes(b"another table")


@pytest.mark.parametrize(
    "harm, message",
    [
        (cut, "truncated or replaced"),
        (spoil, "the SHA-256 of what follows byte 0 is not the one in the index"),
        (Path.unlink, "no such file"),
        (swap_table, "the SHA-256 of what follows byte 0 is not the one in the index"),
    ],
)
def test_damaged_files_are_found(packed, harm, message):
    assert verify(packed) == (28, [])
    harm(Path(packed) / "test-00003.tar")
    with refused(rf"test-00003\..*{message}"):
        verify(packed)


@pytest.mark.parametrize(
    "suffix, data, message",
    [
        (".cls", b"7", "label '7' is none of the 2"),
        (".png", b"no png", "the .png cannot be decoded"),
        (".png", encode(np.zeros((1, 4, 5), np.uint8), "png"), r"shape \(1, 4, 5\), but index.json says uint8 of"),
    ],
)
def test_samples_that_cannot_be_used_are_found(
    packed,
    suffix,
    data,
    message,
):
    rewrite(packed, "train-00001.tar", replaced(suffix, data, 1))
    with refused(rf"train-00001\.tar, key .*{message}"):
        verify(packed)


def test_a_page_table_of_another_shard_is_not_read(packed):
    table = Path(packed) / "train-00002.pages.npy"
    shutil.copy(Path(packed) / "train-00001.pages.npy", table)
    with refused(r"train-00002\.pages\.npy: the SHA-256 of what follows byte 0 is not the one in the index"):
        read_split(packed, "train")
    table.unlink()
    for read in (lambda: read_split(packed, "train"), lambda: verify(packed)):
        with refused(r"train-00002\.pages\.npy: no such file"):
            read()
    pack(numbered(), packed, shards=4)
    assert verify(packed)[0] == 28
