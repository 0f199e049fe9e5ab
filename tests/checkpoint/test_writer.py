"""A checkpoint is there whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from pipeline.checkpoint.manifest import MANIFEST, prune
from pipeline.checkpoint.writer import Writer, newest_checkpoint
from pipeline.errors import InputError
from pipeline.storage.local import LocalStore
from tests.checkpoint.written import write_checkpoint
from tests.conftest import forked


def fill(folder):
    (folder / "state").mkdir()
    (folder / "model.bin").write_bytes(b"m" * 1000)
    (folder / "state" / "optimizer.bin").write_bytes(b"o" * 1000)


@pytest.fixture
def checkpoints(tmp_path):
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_complete_one_is_found(checkpoints):
    assert newest_checkpoint(checkpoints) is None
    for step in (1, 20, 300):
        write_checkpoint(checkpoints / f"step-{step:08d}", fill)
    assert newest_checkpoint(checkpoints) == checkpoints / "step-00000300"
    manifest = json.loads((checkpoints / "step-00000300" / MANIFEST).read_text())
    assert set(manifest["files"]) == {"model.bin", "state/optimizer.bin"}


@pytest.mark.parametrize("damage", ["no manifest", "file missing", "file short", "bit flipped", "manifest cut"])
def test_a_damaged_one_does_not_count(checkpoints, damage):
    for step in (1, 2):
        write_checkpoint(checkpoints / f"step-{step:08d}", fill)
    newest = checkpoints / "step-00000002"
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
    assert newest_checkpoint(checkpoints) == checkpoints / "step-00000001"


def test_pruning_keeps_the_newest_and_clears_what_is_incomplete(checkpoints):
    for step in (1, 2, 3, 4):
        write_checkpoint(checkpoints / f"step-{step:08d}", fill)
    (checkpoints / "step-00000005").mkdir()
    (checkpoints / "step-mine").mkdir()
    prune(str(checkpoints), 2)
    assert names(checkpoints) == ["step-00000003", "step-00000004", "step-mine"]
    prune(str(checkpoints), 0)
    assert names(checkpoints) == ["step-00000003", "step-00000004", "step-mine"]


def test_pruning_spares_the_one_just_written_and_those_kept_for_good(checkpoints):
    for step in (1, 2, 3, 4, 5, 6):
        trainer = {"round": step, "done": int(step == 4)}  # step 4 lies within a round
        text = "no JSON" if step == 1 else json.dumps(trainer)
        write_checkpoint(checkpoints / f"step-{step:08d}", lambda to, text=text: (to / "trainer.json").write_text(text))
    prune(str(checkpoints), 1, every=2, newest="step-00000005")
    assert names(checkpoints) == ["step-00000002", "step-00000005", "step-00000006"]


def test_pruning_spares_what_a_failing_disk_says_nothing_of(checkpoints, monkeypatch):
    for step in (2, 4, 6):
        text = json.dumps({"round": step, "done": 0})
        write_checkpoint(checkpoints / f"step-{step:08d}", lambda to, text=text: (to / "trainer.json").write_text(text))
    whole, failing = LocalStore.read, [True]

    def read(self, name, *args, **options):
        if name == "trainer.json" and "00000002" in self.path and failing:
            raise OSError(errno.ESTALE, "Stale file handle", name)
        return whole(self, name, *args, **options)

    monkeypatch.setattr(LocalStore, "read", read)
    prune(str(checkpoints), 1, every=4)
    assert names(checkpoints) == ["step-00000002", "step-00000004", "step-00000006"]
    failing.clear()
    prune(str(checkpoints), 1, every=4)
    assert names(checkpoints) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("moment", ["first file", "second file", "before manifest"])
def test_a_kill_in_the_middle_of_writing_leaves_the_one_before(tmp_path, checkpoints, moment):
    write_checkpoint(checkpoints / "step-00000001", fill)
    script = f"""
import os, signal
from pathlib import Path
import pipeline.checkpoint.writer as c
def die(): os.kill(os.getpid(), signal.SIGKILL)
def write_a(path):
    with path.open("wb") as file:
        file.write(b"a" * 500)
        file.flush()
        if {moment!r} == "first file": die()
        file.write(b"a" * 500)
def write_b(path):
    path.write_bytes(b"b" * 10)
    if {moment!r} == "second file": die()
if {moment!r} == "before manifest":
    c.write_atomically = lambda file, text: die()
writer = c.Writer(Path({str(tmp_path)!r}), rank=0, world=1, keep=0, every=0, remote="")
writer.start("step-00000002", lambda: None, {{"a.bin": write_a, "b.bin": write_b}})
writer.join()
"""
    done = subprocess.run([sys.executable, "-c", script], env=forked(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert newest_checkpoint(checkpoints) == checkpoints / "step-00000001"
    assert os.path.isdir(checkpoints / "step-00000002")


def test_a_disk_that_fails_for_a_while_says_nothing_about_a_checkpoint(checkpoints, monkeypatch):
    write_checkpoint(checkpoints / "step-00000001", fill)

    def fail(file):
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr("pipeline.checkpoint.manifest.sha256", fail)
    with pytest.raises(OSError, match="Input/output error"):
        newest_checkpoint(checkpoints)
    monkeypatch.undo()
    assert newest_checkpoint(checkpoints) == checkpoints / "step-00000001"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(errno.ENOSPC, "No space left on device"), InputError), (RuntimeError("CUDA error: ..."), RuntimeError)],
)
def test_what_failed_while_copying_decides_whether_a_retry_helps(tmp_path, checkpoints, error, kind):
    write_checkpoint(checkpoints / "step-00000001", fill)
    writer = Writer(tmp_path, rank=0, world=1, keep=0, every=0, remote="")

    def copy():
        raise error

    writer.start("step-00000002", copy, {})
    with pytest.raises((InputError, RuntimeError), match="step-00000002 could not be written") as raised:
        writer.join()
    assert type(raised.value) is kind and names(checkpoints) == ["step-00000001"]
