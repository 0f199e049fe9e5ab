"""Checking a packed data set against its index."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from naign.data.decode import encode
from naign.data.format.audit import verify
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.errors import InputError
from tests.data.numbered import numbered, rewrite
from tests.refused import refused


def twisted(members):
    """The first three samples of a shard with a label of no class, a picture of nothing, and one of another shape."""
    changed = dict(members)
    names = list(changed)
    pictures = [name for name in names if name.endswith(".png")]
    changed[next(name for name in names if name.endswith(".cls"))] = b"7"
    changed[pictures[1]] = b"no png"
    changed[pictures[2]] = encode(np.zeros((1, 4, 5), np.uint8), "png")
    return list(changed.items())


def test_every_planted_fault_is_found(packed):
    report = verify(packed)
    assert report.samples == 28
    folder = Path(packed)
    rewrite(
        packed,
        "train-00000.tar",
        lambda members: members[:-2],
        damage=True,
    )
    rewrite(packed, "train-00001.tar", twisted)
    shutil.copy(folder / "train-00003.tar", folder / "train-00002.tar")
    cut = folder / "test-00000.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    with (folder / "test-00001.tar").open("ab") as tar:
        tar.write(b"more" * 128)
    (folder / "test-00002.tar").unlink()
    (folder / "test-00003.pages.npy").write_bytes(b"another table")
    with pytest.raises(InputError) as caught:
        verify(packed)
    lines = str(caught.value).splitlines()
    for shard, problem in (
        ("train-00000.tar", "truncated or replaced"),
        ("train-00001.tar", "label '7' is none of the 2"),
        ("train-00001.tar", "the .png cannot be decoded"),
        ("train-00001.tar", "shape (1, 4, 5), but index.json says uint8 of (1, 4, 4)"),
        ("train-00002.tar", "the SHA-256 of what follows byte"),
        ("test-00000.tar", "truncated or replaced"),
        ("test-00001.tar", "truncated or replaced"),
        ("test-00002.tar", "no such file"),
        ("test-00003.pages.npy", "the SHA-256 of what follows byte 0 is not the one in the index"),
    ):
        assert any(shard in line and problem in line for line in lines), (shard, problem, lines)


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
    assert verify(packed).samples == 28
