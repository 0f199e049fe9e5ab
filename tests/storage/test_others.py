"""Files on web servers and on the Hugging Face hub, which are only read: a real web server, and its faults."""

import functools
import http.server
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from naign.data.dataset import DataConfig
from naign.data.format.indexing import index
from naign.data.format.writer import pack
from naign.data.loader import Stream, read_split
from naign.errors import InputError, Unavailable
from naign.storage.store import open_store
from tests.data.numbered import numbered


class Web(http.server.SimpleHTTPRequestHandler):
    """Files of a folder with byte ranges, and what may go wrong."""

    faults: ClassVar[list[str]] = []
    """What becomes of the next GETs, one each: `500`, `403`, `cut`, `drop` or ``."""
    ranges: ClassVar[bool] = True
    logins: ClassVar[list[str | None]] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        fault = self.faults.pop(0) if self.faults else ""
        self.logins.append(self.headers.get("Authorization"))
        file = Path(self.translate_path(self.path))
        if fault in ("500", "403"):
            self.send_error(int(fault))
        elif fault == "drop":
            self.connection.close()
        elif not file.is_file() or not wanted or not self.ranges:
            super().do_GET()
        else:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            data = file.read_bytes()[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{file.stat().st_size}")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            if fault == "cut":
                self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The address of a data set of 23 images in 4 shards, without an index.json, on a web server."""
    pack(numbered(), str(tmp_path / "web/mnist"), shards=4)
    for file in (tmp_path / "web/mnist").glob("*.npy"):
        file.unlink()
    (tmp_path / "web/mnist/index.json").unlink()
    Web.faults = []
    Web.ranges = True
    Web.logins = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Web, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/mnist"
    server.shutdown()


def test_tars_on_a_web_server_are_indexed_and_read(web, tmp_path):
    mine = str(tmp_path / "mine")
    assert index(f"{web}/train-{{00000..00003}}.tar", to=mine).split("train").samples == 23
    config = DataConfig(path=web, index=mine)
    assert sorted(read_split(config, "train")[0][:, 0, 0, 0].tolist()) == list(range(23))
    with Stream(config, seed=0, round_size=23) as stream:
        assert sorted(stream.take(0).images[:, 0, 0, 0].tolist()) == list(range(23))
    with pytest.raises(InputError, match=r"only read: it cannot be listed: check the path, or name files, as in"):
        index(web, to=str(tmp_path / "listed"))


def test_files_on_the_hub_are_read_with_the_login(
    web,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(constants, "ENDPOINT", web.removesuffix("/mnist"))
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    data = (tmp_path / "web/mnist/train-00000.tar").read_bytes()
    assert open_store(web).read("train-00000.tar") == data
    assert set(Web.logins) == {"Bearer hf_mine"}


def test_what_fails_in_passing_is_asked_for_again(web, tmp_path):
    store = open_store(web)
    data = (tmp_path / "web/mnist/train-00000.tar").read_bytes()
    Web.faults = ["500", "cut", "drop", "500", ""]
    assert store.read("train-00000.tar", 512, 1536) == data[512:1536]
    assert store.tally.retries >= 3
    assert not Web.faults
    Web.faults = ["cut", ""]
    assert b"".join(store.pieces("train-00000.tar")) == data
    dead = open_store("http://127.0.0.1:9/there")
    for ask in (dead.size, dead.exists, dead.read):
        with pytest.raises(Unavailable, match="given up"):
            ask("a")
    Web.faults = ["500"] * 10_000
    with pytest.raises(Unavailable, match="given up"):
        store.read("train-00000.tar", 0, 10)


def test_what_a_web_server_may_not_do(web, tmp_path):
    store = open_store(web)
    with pytest.raises(InputError, match=r"mnist/none.tar: no such object"):
        store.read("none.tar")
    assert not store.exists("none.tar")
    assert store.exists("train-00000.tar")
    with pytest.raises(InputError, match="expected: truncated"):
        store.read("train-00000.tar", 0, 10**9)
    for change in (lambda: store.put("a", b""), lambda: store.delete("train-00000.tar")):
        with pytest.raises(InputError, match="web servers are only read"):
            change()
    Web.faults = ["403"]
    with pytest.raises(InputError, match="access denied .403 Forbidden.: check the credentials"):
        store.read("train-00000.tar", 0, 10)
    Web.ranges = False
    with pytest.raises(InputError, match="does not serve byte ranges"):
        store.read("train-00000.tar", 0, 10)
    for scheme in ("https", "webdavs"):
        with pytest.raises(InputError, match="holds a user or a password"):
            open_store(f"{scheme}://me:secret@example.org/data")
    with pytest.raises(InputError, match="or a query") as refused:
        open_store("https://example.org/data?sig=secret")
    assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match="web servers are only read"):
        index(f"{web}/train-{{00000..00003}}.tar")


def test_schemes_that_are_not_there(monkeypatch):
    for path in ("ftpx://host/data", "memory://host/data"):
        with pytest.raises(InputError, match=r"cannot read (ftpx|memory):// paths: give a local folder"):
            open_store(path)
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "naign.storage.others")
    with pytest.raises(InputError, match=r"gs://bucket: cannot open gs:// paths \(.*\): pip install obstore"):
        open_store("gs://bucket")
