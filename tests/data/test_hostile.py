"""Damaged and nonsensical data sets: each is refused with an InputError that says what, where and what to do."""

import copy
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from naign.data.decode import encode
from naign.data.format.audit import verify
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.catalog import load
from tests.data.numbered import edit_index, first, numbered, replaced, rewrite
from tests.refused import refused

SHARD = ("splits", "train", "shards", 0)


def edited(index, keys, value):
    """index.json with one value replaced."""
    changed = copy.deepcopy(index)
    *outer, last = keys
    place = changed
    for key in outer:
        place = place[key]
    place[last] = value
    return json.dumps(changed).encode()


@pytest.mark.parametrize(
    "keys, values",
    [
        ((*SHARD, "samples"), [5.0, -1, True]),
        ((*SHARD, "bytes"), [-1, 1000]),
        ((*SHARD, "pages"), ["0" * 63, "g" * 64, "0" * 64 + "\n"]),
        ((*SHARD, "name"), ["", "../x.tar", "a\\b", ".x.tar"]),
        ((*SHARD, "name"), ["a\0b", "\ud800", "x" * 300]),
        ((*SHARD, "name"), ["train-00001.tar", "test-00000.tar"]),  # listed twice
        ((*SHARD, "colour"), [1]),
        (("splits", "train", "samples"), [None, 24]),
        (("splits",), [{}, []]),
        (("kind",), ["sound"]),
        (("shape",), ["188", [4, 4]]),
        (("shape",), [[1, 10**6, 10**6], [2, 8, 8], [1, 0, 8]]),
        (("labels",), [[1, 2]]),
        (("name",), [5]),
        (("colour",), [1]),
        (("label",), ["name:(.)", "json:"]),
        (("broken",), [{"train-00000.tar": 5}]),
        (("dealt",), [1]),
    ],
)
def test_a_manifest_of_nonsense(packed, keys, values):
    index = json.loads((Path(packed) / "index.json").read_text())
    Manifest.parse(json.dumps(index).encode(), where="here")
    for value in values:
        with refused("here: malformed .*pack or index the data set again with --force"):
            Manifest.parse(edited(index, keys, value), where="here")


def test_manifests_of_other_forms(packed):
    index = json.loads((Path(packed) / "index.json").read_text())
    for text in (b"[" * 100_000, b"{", b"5"):
        with refused("malformed"):
            Manifest.parse(text, where="here")
    with refused("format 1, but .*index the data set again with --force"):
        Manifest.parse(edited(index, ("format",), 1), where="here")
    of_before = edited(index, (*SHARD, "sha256"), "0" * 64)  # of the whole tar
    assert Manifest.parse(of_before, where="here") == Manifest.load(packed)


def npy(*values):
    return encode(np.array(values, np.float32), "npy")


def lying(count):
    """A small .npy whose header claims that many values."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count},), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)


def zipped():
    stream = io.BytesIO()
    np.savez(stream, np.zeros(2, np.float32))
    return stream.getvalue()


@pytest.mark.parametrize(
    "suffix, data, message",
    [
        (".npy", npy(0, np.nan), "not finite"),
        (".npy", npy(0, 0, 0), "float32 of shape .3,., but index.json says"),
        (".npy", lying(99_999_999_999), "cannot be decoded"),
        (".npy", lying(2).replace(b"<f4", b"|O8"), "OBJECT"),
        (".npy", zipped(), "cannot be decoded"),
        (".cls", b"9" * 5000, "label '9+' is none of the 8"),
    ],
)
def test_damaged_points_are_refused_by_training_and_verify(
    tmp_path,
    suffix,
    data,
    message,
):
    source = first(load("toy2d:gaussians"), 12)
    pack(source, str(tmp_path), shards=2)
    rewrite(str(tmp_path), "train-00001.tar", replaced(suffix, data))
    for read in (lambda path: read_split(path, "train"), lambda path: verify(path)):
        with refused(rf"train-00001\.tar, key train-\d+: .*{message}"):
            read(str(tmp_path))


def test_bytes_of_no_picture_or_tar_are_named_without_addresses(packed):
    rewrite(packed, "train-00001.tar", replaced(".png", b"no picture"))
    with refused(r"key train-\d+: .*not a picture that Pillow can read") as caught:
        read_split(packed, "train")
    assert "0x" not in str(caught.value)
    file = Path(packed) / "train-00000.tar"
    file.write_bytes(b"x" * file.stat().st_size)
    with refused(r"00000\.tar: the SHA-256 of what follows byte 0") as caught:
        read_split(packed, "train")
    assert "_io." not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5000, 40_000])
def test_a_shard_of_another_size_is_not_read(packed, size):
    file = Path(packed) / "train-00003.tar"
    whole = file.stat().st_size
    file.write_bytes((file.read_bytes() * 3)[:size])
    with refused(rf"00003.tar: {size} bytes, but index.json says {whole}: truncated or rep"):
        read_split(packed, "train")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_directory_or_a_pipe_in_place_of_a_shard(packed, make):
    file = Path(packed) / "train-00003.tar"
    file.unlink()
    make(file)
    for use in (lambda: read_split(packed, "train"), lambda: verify(packed)):
        with refused(r"00003\.tar: not a regular file: remove it"):
            use()


def test_more_samples_than_memory_holds(packed):
    shard = {
        "name": "train-00000.tar",
        "samples": 10**12,
        "bytes": 10**16,
        "pages": "0" * 64,
    }
    split = {"samples": 10**12, "shards": [shard]}
    edit_index(packed, splits={"train": split})
    with refused(f"bytes, but index.json says {10**16}"):
        read_split(packed, "train")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(tmp_path, seed):
    with refused("--seed"):
        pack(numbered(), str(tmp_path), seed=seed)
    with refused("--seed"):
        load("digits", seed=seed)
