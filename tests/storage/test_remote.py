"""Stores that are read through fsspec: a real web server, its faults, and fsspec's own file systems."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import fsspec
import pytest

from naign.data.dataset import DataConfig
from naign.data.format.indexing import index
from naign.data.format.writer import pack
from naign.data.loader import Stream, read_split
from naign.errors import InputError
from naign.storage.retry import Unavailable
from naign.storage.store import open_store
from tests.data.numbered import numbered


class Web(http.server.SimpleHTTPRequestHandler):
    """Files of a folder with byte ranges, and what may go wrong."""

    faults: ClassVar[list[str]] = []
    """What becomes of the next GETs, one each: `500`, `403`, `cut`, `drop` or ``."""
    ranges: ClassVar[bool] = True
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted, fault = self.headers.get("Range"), type(self).faults.pop(0) if type(self).faults else ""
        type(self).asked.append(self.path)
        file = Path(self.translate_path(self.path))
        if fault in ("500", "403"):
            self.send_error(int(fault))
        elif fault == "drop":
            self.connection.close()
        elif not file.is_file() or not wanted or not self.ranges:
            super().do_GET()
        else:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            data = file.read_bytes()[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{file.stat().st_size}")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            if fault == "cut":
                self.connection.close()

    def translate_path(self, path: str) -> str:
        return super().translate_path(urlsplit(path).path)  # a proxy is asked for whole addresses

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a data set of 23 images in 4 shards, without an index.json, on a web server."""
    monkeypatch.setattr("naign.storage.retry.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 0.01)
    pack(numbered(), str(tmp_path / "web/mnist"), shards=4, progress=False)
    for file in (tmp_path / "web/mnist").glob("*.npy"):
        file.unlink()
    (tmp_path / "web/mnist/index.json").unlink()
    Web.faults, Web.ranges, Web.asked = [], True, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Web, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/mnist"
    server.shutdown()


def test_tars_on_a_web_server_are_indexed_and_read(web: str, tmp_path: Path) -> None:
    mine = str(tmp_path / "mine")
    assert index(f"{web}/train-{{00000..00003}}.tar", to=mine, progress=False).split("train").samples == 23
    config = DataConfig(path=web, index=mine)
    assert sorted(read_split(config, "train")[0][:, 0, 0, 0].tolist()) == list(range(23))
    with Stream(config, seed=0, round_size=23) as stream:
        assert sorted(stream.take(0).images[:, 0, 0, 0].tolist()) == list(range(23))
    assert index(web, to=str(tmp_path / "listed"), progress=False).split("test").samples == 5


def test_what_fails_in_passing_is_asked_for_again(web: str, tmp_path: Path) -> None:
    store, data = open_store(web), (tmp_path / "web/mnist/train-00000.tar").read_bytes()
    Web.faults = ["500", "cut", "drop", "500", ""]
    assert store.read("train-00000.tar", 512, 1536) == data[512:1536]
    assert store.tally.retries >= 3 and not Web.faults
    Web.faults = ["cut", ""]
    assert b"".join(store.pieces("train-00000.tar")) == data
    dead = open_store("http://127.0.0.1:9/there")
    for ask in (dead.size, dead.exists, dead.read):
        with pytest.raises(Unavailable, match="given up"):
            ask("a")
    Web.faults = ["500"] * 100
    with pytest.raises(Unavailable, match="given up"):
        store.read("train-00000.tar", 0, 10)


def test_what_a_web_server_may_not_do(web: str, tmp_path: Path) -> None:
    store = open_store(web)
    with pytest.raises(InputError, match=r"mnist/none.tar: no such file"):
        store.read("none.tar")
    assert not store.exists("none.tar") and store.exists("train-00000.tar")
    with pytest.raises(InputError, match="expected: truncated"):
        store.read("train-00000.tar", 0, 10**9)
    for change in (lambda: store.put("a", b""), lambda: store.delete("train-00000.tar")):
        with pytest.raises(InputError, match="http:// is only read"):
            change()
    for ask in (store.list, store.folders):
        Web.faults = ["403"]
        with pytest.raises(InputError, match="403: .*: check what the account of this machine may read"):
            ask()
    Web.ranges = False
    with pytest.raises(InputError, match="does not serve byte ranges"):
        store.read("train-00000.tar", 0, 10)
    for scheme in ("https", "webdavs"):
        with pytest.raises(InputError, match="holds a user or a password"):
            open_store(f"{scheme}://me:secret@example.org/data")
    with pytest.raises(InputError, match="or a query") as refused:
        open_store("https://example.org/data?sig=secret")
    assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match="http:// is only read"):
        index(f"{web}/train-{{00000..00003}}.tar", progress=False)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_file_systems_of_fsspec(scheme: str, tmp_path: Path) -> None:
    pack(numbered(), str(tmp_path / "there"), shards=4, progress=False)
    path = f"file://{tmp_path}/there" if scheme == "file" else "memory://a/there"
    if scheme == "memory":
        for file in (tmp_path / "there").iterdir():
            fsspec.filesystem("memory").pipe_file(f"/a/there/{file.name}", file.read_bytes())
    store, local = open_store(path), open_store(str(tmp_path / "there"))
    assert store.list() == local.list() and open_store(path.replace("there", "nowhere")).list() == []
    assert store.folders() == [] and store.size("index.json") == local.size("index.json")
    assert store.version("index.json") == store.version("index.json") != ""
    assert read_split(path, "train")[0].equal(read_split(str(tmp_path / "there"), "train")[0])
    with pytest.raises(InputError, match="no such file"):
        store.size("none")


def test_schemes_that_are_not_there() -> None:
    with pytest.raises(InputError, match=r"cannot read ftps?x:// paths: give a local folder"):
        open_store("ftpx://host/data")
    with pytest.raises(InputError, match=r"sftp://host: cannot read sftp:// paths \(.*\): pip install what it names"):
        open_store("sftp://host")


def test_the_proxy_of_the_environment_is_used(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = open_store("http://nowhere.invalid/mnist")
    monkeypatch.setenv("http_proxy", web.removesuffix("/mnist"))
    assert elsewhere.read("train-00000.tar", 0, 5) == open_store(web).read("train-00000.tar", 0, 5)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"given up after \d+ attempts; .*127\.0\.0\.1:9"):
        elsewhere.read("train-00001.tar", 0, 5)
