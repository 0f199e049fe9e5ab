"""The local store."""

import os
from pathlib import Path

import pytest

import naign
from naign.errors import InputError, Unavailable, check_address
from naign.settings.read import read_yaml
from naign.storage.local import LocalStore
from naign.storage.store import open_store


def test_a_local_file_there_and_back(tmp_path):
    local = open_store(str(tmp_path / "new/folder"))
    assert local.list() == []
    local.put("b", b"12345")
    local.put("a", b"1")
    local.put("a", b"123")
    assert local.list() == ["a", "b"]
    assert local.size("a") == 3
    assert local.read("b") == b"12345"
    assert Path(local.url("a")).read_bytes() == b"123"
    assert local.read("b", 1, 3) == b"23"
    assert local.read("b", 3) == b"45"
    assert local.read("b", 5, 5) == b""
    with pytest.raises(InputError, match="folder/b: 5 bytes where 6 were expected: truncated"):
        local.read("b", 2, 6)
    (tmp_path / "new/folder/deeper").mkdir()
    assert local.exists("a")
    for name in ("c", "deeper", "deeper/c"):
        assert not local.exists(name)
    assert not open_store(str(tmp_path / "nowhere")).exists("a")
    with pytest.raises(InputError, match="not a directory: check|file exists.*: choose"):
        open_store(str(tmp_path / "new/folder/a")).exists("c")
    local.delete("a")
    local.delete("a")
    assert local.list() == ["b"]
    with pytest.raises(InputError, match="folder/a: no such file"):
        next(local.pieces("a"))


def test_a_broken_put_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    local = LocalStore(str(tmp_path))
    local.put("a", b"old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(Unavailable, match="/a: No space left on device: free some, or choose another folder"):
        local.put("a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert local.read("a") == b"old"


def test_paths_that_are_no_store(tmp_path):
    (tmp_path / "file").touch()
    for path in ("", " ", "a\0b"):
        with pytest.raises(InputError, match="is no path"):
            open_store(path)
    with pytest.raises(InputError, match="s3://"):
        open_store("s3://")
    with pytest.raises(InputError, match="not a directory: check|file exists.*: choose"):
        open_store(str(tmp_path / "file")).put("a", b"")
    assert open_store("~nobody-of-that-name/x").list() == []


@pytest.mark.parametrize("path", ["s3://b/d?X-Amz-Signature=SECRET", "s3://me:SECRET@b/d", "s3:/b/d?SECRET"])
def test_a_secret_in_an_address_is_refused_and_not_shown(path):
    for call in (open_store, read_yaml):
        with pytest.raises(InputError, match="the address holds a user or a password, or a query") as refused:
            call(path)
        assert "SECRET" not in str(refused.value)
    check_address("s3://bucket/train-0000?.tar")  # a pattern of `naign index`


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written():
    with pytest.raises(InputError, match=r"/proc/x/a: cannot be written \(no such file .*\): choose another folder"):
        open_store("/proc/x").put("a", b"")
    with pytest.raises(InputError, match=r"cannot be written \(file name too long\): choose another folder"):
        open_store("x" * 300).put("a", b"")


def test_links_that_lead_nowhere_are_listed_and_named(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "lost.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").symlink_to(tmp_path / "here")
    local = open_store(str(tmp_path))
    assert local.list() == ["lost.tar"]
    with pytest.raises(InputError, match=r"lost.tar: no such file"):
        local.size("lost.tar")


def test_a_stream_reads_a_file_by_any_name_and_never_ends_by_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("a.tar")
    file.write_bytes(bytes(5_000_000))
    for name in ("a.tar", file, str(tmp_path / "a.tar")):
        with naign.gopen(name) as stream:
            assert len(stream.read()) == 5_000_000
    with naign.gopen(file) as stream:
        stream.read(10)
        os.truncate(file, 3_000_000)
        for _ in range(2):
            with pytest.raises(InputError, match="bytes where .* were expected"):
                stream.read()


@pytest.mark.parametrize("mode", ["wb", "r+b", "rt"])
def test_a_stream_is_only_read(mode):
    with pytest.raises(InputError, match="streams are only read"):
        naign.gopen("a.tar", mode)


def test_a_streams_address_has_no_secrets():
    with pytest.raises(InputError, match="a query") as caught:
        naign.gopen("https://host/a.tar?signature=SECRET")
    assert "SECRET" not in str(caught.value)
