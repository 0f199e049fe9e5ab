"""What would end a run hours later is found in its first second."""

from types import SimpleNamespace

import pytest

from naign.errors import InputError, Unavailable
from naign.observe.doctor import preflight
from naign.storage.local import LocalStore
from naign.storage.store import open_store
from tests.refused import refused

GB = 10**9


def check(run, *, remote="", checkpoint_bytes=GB // 1000):
    return preflight(str(run), remote, checkpoint_bytes)


@pytest.fixture
def disk(monkeypatch):
    """The disk, whose free bytes can be changed."""
    disk = SimpleNamespace(free=100 * GB)
    monkeypatch.setattr("naign.observe.doctor.shutil.disk_usage", lambda place: disk)
    return disk


def test_a_machine_with_room_has_no_warnings_and_keeps_no_trace(tmp_path, disk):
    remote = tmp_path / "remote"
    remote.mkdir()
    assert check(tmp_path / "runs" / "new", remote=str(remote)) == []
    assert list(tmp_path.rglob("*")) == [remote]


@pytest.mark.parametrize("run", ["file/run", "link"])
def test_a_run_that_is_not_in_a_folder_cannot_be_written(tmp_path, run):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with refused(r"run\.path '.*' cannot be written: .*: choose another"):
        check(tmp_path / run)


def test_room_for_checkpoints(tmp_path, disk):
    disk.free = 3 * GB
    assert check(tmp_path, checkpoint_bytes=GB) == []
    for free, shown in ((3 * GB - 1, "3.0 GB"), (GB, "1.0 GB")):
        disk.free = free
        (warning,) = check(tmp_path, checkpoint_bytes=GB)
        assert f"run.path '{tmp_path}' has {shown} free, a checkpoint takes 1.0 GB" in warning
    disk.free = GB - 1
    with refused(r"has 1000.0 MB free, a checkpoint takes 1.0 GB: free some, or choose"):
        check(tmp_path, checkpoint_bytes=GB)


def test_a_bucket_that_can_be_written(tmp_path, bucket):
    assert check(tmp_path, remote=f"{bucket}/runs/one") == []
    assert open_store(f"{bucket}/runs/one").list() == []


def test_a_bucket_that_is_not_there(tmp_path, s3):
    refusal = "run.remote cannot be written: s3://no-such-bucket/run/.naign-preflight: there is no bucket"
    with refused(refusal):
        check(tmp_path, remote="s3://no-such-bucket/run")


def test_a_bucket_out_of_reach(tmp_path, s3, monkeypatch):
    from naign.storage.s3_client import forget_clients

    monkeypatch.setattr("naign.storage.retry.FIRST_PATIENCE", 0.1)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    forget_clients()
    with pytest.raises(Unavailable, match="given up"):
        check(tmp_path, remote="s3://bucket/run")


def test_what_is_no_remote(tmp_path):
    with refused("cannot read ftpx:// paths"):
        check(tmp_path, remote="ftpx://bucket/run")
    only_read = "run.remote cannot be written: .*web servers are only read: write to a local folder"
    with refused(only_read):
        check(tmp_path, remote="https://server/run")


def test_the_object_goes_whatever_happens(tmp_path, monkeypatch):
    put = LocalStore.put

    def put_only(store, name, data):
        put(store, name, data)
        raise InputError("written, but access denied to look at it")

    monkeypatch.setattr(LocalStore, "put", put_only)
    with refused("written, but"):
        check(tmp_path, remote=f"{tmp_path}/remote")
    assert list((tmp_path / "remote").iterdir()) == []
