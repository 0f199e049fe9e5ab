"""The copy of a run in a bucket: what stays of it, and whose it is."""

import json
import re

import pytest

from naign.checkpoint import bucket as module
from naign.checkpoint.bucket import (
    OWNER,
    PICTURES,
    RECORDS,
    check_claim,
    fetch_shown,
    mirror,
    newest_first,
    take_over,
)
from naign.checkpoint.manifest import MANIFEST, prune
from naign.checkpoint.writer import Writer
from naign.errors import Conflict, InputError, StoreLost, Unavailable
from naign.storage.store import open_store
from tests.checkpoint.written import start_model


def put(remote, step, *, done=True):
    root = f"{remote}/checkpoints/step-{step:08d}"
    open_store(root).put("trainer.json", json.dumps({"round": step, "done": 0}).encode())
    open_store(f"{root}/state").put("rank-00000-of-00001.safetensors", b"state")
    if done:
        open_store(root).put(MANIFEST, b"{}")


def steps(remote):
    """Of those that hold a file; a server may take its time to forget a folder."""
    root = f"{remote}/checkpoints"
    found = []
    for name in open_store(root).folders():
        if name != "step-mine" and open_store(f"{root}/{name}").list():
            found.append(int(name.removeprefix("step-")))
    return found


def test_what_earlier_processes_left_is_pruned_too(bucket):
    remote = f"{bucket}/run"
    for step in (1, 2, 3, 5, 6, 7, 9):
        put(remote, step)
    put(remote, 4, done=False)  # a process was killed while it sent this one
    open_store(f"{remote}/checkpoints/step-mine").put("kept", b"not ours")
    prune(f"{remote}/checkpoints", 2, newest="step-00000007")
    assert open_store(f"{remote}/checkpoints/step-mine").list() == ["kept"]
    assert steps(remote) == [6, 7, 9]  # the one after it is nothing that this one may judge
    put(remote, 8)
    prune(f"{remote}/checkpoints", 1, newest="step-00000008")
    assert steps(remote) == [8, 9]
    prune(f"{remote}/checkpoints", 0, newest="step-00000009")
    assert steps(remote) == [8, 9]


def test_the_process_that_started_last_has_the_bucket(bucket, caplog):
    caplog.set_level("INFO", "naign.bucket")
    first = take_over(f"{bucket}/run")
    check_claim(f"{bucket}/run", first)
    assert not caplog.messages
    second = take_over(f"{bucket}/run")
    (message,) = caplog.messages
    assert re.match(rf"{bucket}/run: the earlier start of this run on \S+ can no longer upload$", message)
    check_claim(f"{bucket}/run", second)
    with pytest.raises(Conflict, match=r"/run was taken over by a run that started later \(on .*--run.remote"):
        check_claim(f"{bucket}/run", first)
    open_store(f"{bucket}/run").delete(OWNER)  # a person may: nobody else claims it then
    check_claim(f"{bucket}/run", first)


def test_a_checkpoint_sent_while_another_process_takes_the_bucket_over_does_not_count(bucket, tmp_path, monkeypatch):
    remote = f"{bucket}/run"
    copy = module.send_file
    writer = Writer(tmp_path, remote=remote, claim=take_over(remote))

    def send(file, url):
        copy(file, url)
        if file.name == "model.bin":
            take_over(remote)

    monkeypatch.setattr(module, "send_file", send)
    start_model(writer, "step-00000001")
    with pytest.raises(InputError, match="taken over by a run that started later"):
        writer.join()
    assert open_store(f"{remote}/checkpoints/step-00000001").list() == ["model.bin"]


def test_a_record_that_changes_is_sent_and_fetched_whatever_its_size(bucket, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    for step in (256, 288):
        (run / "config.yaml").write_text(f"seed: {step}")
        mirror(run, bucket, RECORDS)
        assert fetch_shown(bucket, copy) == 1
        assert (copy / "config.yaml").read_text() == f"seed: {step}"
    assert fetch_shown(bucket, copy) == 0
    (run / "trackers").mkdir()
    for name in ("aaaa", "bbbb"):  # the file was deleted to begin a new run there
        (run / "trackers/mlflow.txt").write_text(name)
        mirror(run, bucket, PICTURES)
        assert fetch_shown(bucket, copy) == 1
        assert (copy / "trackers/mlflow.txt").read_text() == name
    assert fetch_shown(bucket, tmp_path / "anew") == 2


def unreachable(*_):
    raise Unavailable("the network is down")


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_nothing_is_done_before_the_last_checkpoint_is_in_the_bucket(
    failures,
    bucket,
    tmp_path,
    monkeypatch,
):
    remote = f"{bucket}/run"
    upload = module.upload
    asked = []

    def fail_at_first(folder, place, names):
        asked.append(names)
        if len(asked) <= failures:
            unreachable()
        upload(folder, place, names)

    monkeypatch.setattr(module, "upload", fail_at_first)
    writer = Writer(tmp_path, remote=remote)
    start_model(writer, "step-00000001")
    if failures == 2:
        with pytest.raises(StoreLost, match=f"step-00000001 could not be sent to {remote}: start again"):
            writer.finish()
    else:
        assert writer.finish()
    assert list(newest_first(remote)) == ["step-00000001"] * (failures < 2)


class Stranger:
    """A server's list of names that no file of a run can have."""

    def __init__(self, name):
        self.names = [name]

    def list(self):
        return self.names

    def url(self, name):
        return f"s3://there/{name}"

    def read(self, name):
        return b"taken"


@pytest.mark.parametrize("name", ["../../out", "..", "a\x1b[2J"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "locate", lambda url: (Stranger(name), url.rpartition("/")[2]))
    with pytest.raises(InputError, match="is not a name that a file of a run can have"):
        fetch_shown("s3://there", tmp_path / "run")
    assert not list(tmp_path.rglob("*"))
