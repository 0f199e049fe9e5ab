"""A checkpoint is there whole or not at all."""

import json
import os
import signal
import subprocess
import sys

import pytest

from pipeline.checkpoint.writer import MANIFEST, newest_checkpoint, prune_checkpoints, write_checkpoint
from tests.conftest import forked


def fill(folder):
    (folder / "state").mkdir()
    (folder / "model.bin").write_bytes(b"m" * 1000)
    (folder / "state" / "optimizer.bin").write_bytes(b"o" * 1000)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_complete_one_is_found(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (1, 20, 300):
        write_checkpoint(tmp_path / f"step-{step:08d}", fill)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000300"
    manifest = json.loads((tmp_path / "step-00000300" / MANIFEST).read_text())
    assert set(manifest["files"]) == {"model.bin", "state/optimizer.bin"}


@pytest.mark.parametrize("damage", ["no manifest", "file missing", "file short", "bit flipped", "manifest cut"])
def test_a_damaged_one_does_not_count(tmp_path, damage):
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step-{step:08d}", fill)
    newest = tmp_path / "step-00000002"
    match damage:
        case "no manifest":
            (newest / MANIFEST).unlink()
        case "file missing":
            (newest / "model.bin").unlink()
        case "file short":
            (newest / "model.bin").write_bytes(b"m" * 999)
        case "bit flipped":
            (newest / "model.bin").write_bytes(b"m" * 999 + b"n")
        case "manifest cut":
            (newest / MANIFEST).write_text((newest / MANIFEST).read_text()[:20])
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001"


def test_pruning_keeps_the_newest_and_clears_what_is_incomplete(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path / f"step-{step:08d}", fill)
    (tmp_path / "step-00000005").mkdir()
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    prune_checkpoints(tmp_path, 0)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("moment", ["first file", "second file", "before manifest"])
def test_a_kill_in_the_middle_of_writing_leaves_the_one_before(tmp_path, moment):
    write_checkpoint(tmp_path / "step-00000001", fill)
    script = f"""
import os, signal
from pathlib import Path
import pipeline.checkpoint.writer as c
def die(): os.kill(os.getpid(), signal.SIGKILL)
def fill(folder):
    with (folder / "a.bin").open("wb") as file:
        file.write(b"a" * 500)
        file.flush()
        if {moment!r} == "first file": die()
        file.write(b"a" * 500)
    (folder / "b.bin").write_bytes(b"b" * 10)
    if {moment!r} == "second file": die()
if {moment!r} == "before manifest":
    c.write_atomically = lambda file, text: die()
c.write_checkpoint(Path({str(tmp_path)!r}) / "step-00000002", fill)
"""
    done = subprocess.run([sys.executable, "-c", script], env=forked(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert os.path.isdir(tmp_path / "step-00000002")
