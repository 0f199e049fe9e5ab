"""Stores: the local one whole, and of the S3 one what needs no server."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, IncompleteReadError, NoCredentialsError
from botocore.response import StreamingBody

from pipeline.data import store
from pipeline.data.samples import read_samples
from pipeline.data.store import LocalStore, S3Store, open_store
from pipeline.errors import InputError


def test_a_local_file_there_and_back(tmp_path: Path) -> None:
    local = open_store(str(tmp_path / "new/folder"))
    assert local.list() == []
    (tmp_path / "source").write_bytes(b"12345")
    local.put("b", tmp_path / "source")
    local.put("a", b"1")
    local.put("a", b"123")
    assert local.list() == ["a", "b"] and local.size("a") == 3 and local.read("b") == b"12345"
    assert Path(local.url("a")).read_bytes() == b"123"
    local.delete("a")
    local.delete("a")
    assert local.list() == ["b"]
    with pytest.raises(InputError, match="folder/a: no such file"):
        local.open("a")


def test_a_broken_put_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalStore(str(tmp_path))
    local.put("a", b"old")

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="No space"):
        local.put("a", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and local.read("a") == b"old"


def test_paths_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("", " ", "a\0b"):
        with pytest.raises(InputError, match="is no path"):
            open_store(path)
    for path in ("s3://", "http://host/folder"):
        with pytest.raises(InputError, match=path):
            open_store(path)
    with pytest.raises(InputError, match="give a folder"):
        open_store(str(tmp_path / "file")).put("a", b"")
    assert open_store("~nobody-of-that-name/x").list() == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(InputError, match=r"/proc/x/a: cannot be written \(no such file .*\): choose another folder"):
        open_store("/proc/x").put("a", b"")
    with pytest.raises(InputError, match=r"cannot be written \(file name too long\): choose a shorter path"):
        open_store("x" * 300).put("a", b"")


class Server:
    """A client whose every call ends in the given way."""

    def __init__(self, *, body: StreamingBody | None = None, error: Exception | None = None) -> None:
        self.body, self.error = body, error

    def __getattr__(self, name: str) -> Any:
        def call(**_: object) -> dict[str, Any]:
            if self.error:
                raise self.error
            return {"Body": self.body}

        return call


def test_an_s3_body_that_ends_short_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name in ("a.cls", "b.cls"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    data = whole.getvalue()
    for length in (0, 512, 700, 1024):  # 512 ends exactly between two samples
        body = StreamingBody(io.BytesIO(data[:length]), len(data))
        monkeypatch.setattr(store, "_client", lambda body=body: Server(body=body))
        with pytest.raises(IncompleteReadError):
            list(read_samples(open_store("s3://bucket/x").open("a.tar"), "a.tar"))
    with pytest.raises(IncompleteReadError):
        open_store("s3://bucket/x").read("a.tar")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("NoSuchBucket", "s3://bucket/deep/x/a: there is no bucket bucket"),
        ("NoSuchKey", "s3://bucket/deep/x/a: no such object"),
        ("AccessDenied", r"s3://bucket/deep/x/a: access denied \(AccessDenied\)"),
    ],
)
def test_what_s3_refuses_is_the_users_to_put_right(code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ClientError({"Error": {"Code": code}}, "GetObject")
    monkeypatch.setattr(store, "_client", lambda: Server(error=error))
    with pytest.raises(InputError, match=message):
        open_store("s3://bucket/deep/x/").open("a")


def test_missing_credentials_and_a_failing_server(monkeypatch: pytest.MonkeyPatch) -> None:
    s3 = S3Store("s3://bucket/x")
    assert pickle.loads(pickle.dumps(s3)).url("a") == "s3://bucket/x/a"
    monkeypatch.setattr(store, "_client", lambda: Server(error=NoCredentialsError()))
    with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID"):
        s3.size("a")
    monkeypatch.setattr(store, "_client", lambda: Server(error=ClientError({"Error": {"Code": "SlowDown"}}, "Put")))
    with pytest.raises(ClientError):  # worth a retry, so a crash
        s3.size("a")
