"""A checkpoint is there whole or not at all."""

import errno
import json
import os
import signal

import pytest

from naign.checkpoint import writer
from naign.checkpoint.manifest import MANIFEST, prune
from naign.checkpoint.writer import Writer, newest_checkpoint
from naign.errors import InputError, Unavailable
from tests.checkpoint.written import write_checkpoint


def fill(folder):
    (folder / "state").mkdir()
    (folder / "model.bin").write_bytes(b"m" * 1000)
    (folder / "state" / "optimizer.bin").write_bytes(b"o" * 1000)


@pytest.fixture
def checkpoints(tmp_path):
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(os.listdir(folder))


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


def test_pruning_removes_the_manifest_first(checkpoints, monkeypatch):
    for step in (1, 2):
        write_checkpoint(checkpoints / f"step-{step:08d}", fill)
    monkeypatch.setattr("naign.checkpoint.manifest.shutil.rmtree", lambda *_, **__: None)  # it is killed before
    prune(str(checkpoints), 1)
    assert not (checkpoints / "step-00000001" / MANIFEST).exists()
    assert (checkpoints / "step-00000002" / MANIFEST).exists()


def test_pruning_spares_the_one_just_written_and_those_after_it(checkpoints):
    for step in (1, 2, 3, 4, 5, 6):
        write_checkpoint(checkpoints / f"step-{step:08d}", fill)
    prune(str(checkpoints), 1, newest="step-00000005")
    assert names(checkpoints) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("moment", ["first file", "second file", "before manifest"])
def test_a_kill_in_the_middle_of_writing_leaves_the_one_before(tmp_path, checkpoints, moment):
    write_checkpoint(checkpoints / "step-00000001", fill)
    write = writer.write_atomically

    def die_at(reached):
        if moment == reached:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_a(path):
        with path.open("wb") as file:
            file.write(b"a" * 500)
            file.flush()
            die_at("first file")
            file.write(b"a" * 500)

    def write_b(path):
        path.write_bytes(b"b" * 10)
        die_at("second file")

    def finish(file, text):
        die_at("before manifest")
        write(file, text)

    child = os.fork()
    if not child:
        try:
            writer.write_atomically = finish
            one = Writer(tmp_path, keep=1)
            one.start("step-00000002", {"a.bin": write_a, "b.bin": write_b})
            one.join()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert newest_checkpoint(checkpoints) == checkpoints / "step-00000001"
    assert names(checkpoints) == ["step-00000001", "step-00000002"]


def test_a_disk_that_fails_for_a_while_says_nothing_about_a_checkpoint(checkpoints, monkeypatch):
    write_checkpoint(checkpoints / "step-00000001", fill)

    def fail(file):
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr("naign.checkpoint.manifest.sha256", fail)
    with pytest.raises(OSError, match="Input/output error"):
        newest_checkpoint(checkpoints)
    monkeypatch.undo()
    assert newest_checkpoint(checkpoints) == checkpoints / "step-00000001"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Unavailable),
        (OSError(errno.EACCES, "no"), InputError),
        (RuntimeError("CUDA error: ..."), RuntimeError),
    ],
)
def test_what_failed_decides_whether_a_retry_helps(tmp_path, checkpoints, error, kind):
    write_checkpoint(checkpoints / "step-00000001", fill)
    writer = Writer(tmp_path)

    def write(file):
        raise error

    writer.start("step-00000002", {"first": write})
    with pytest.raises((InputError, Unavailable, RuntimeError), match="step-00000002 could not be written") as raised:
        writer.join()
    assert type(raised.value) is kind
    assert names(checkpoints) == ["step-00000001"]


def test_what_a_failed_write_left_is_removed(tmp_path, checkpoints):
    write_checkpoint(checkpoints / "step-00000001", fill)
    writer = Writer(tmp_path)

    def fail(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.start("step-00000002", {"first": lambda file: file.write_text("whole"), "second": fail})
    with pytest.raises(Unavailable, match="step-00000002 could not be written"):
        writer.join()
    assert names(checkpoints) == ["step-00000001"]
