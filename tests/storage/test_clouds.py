"""Buckets of Google's and Azure's kind, by obstore: Azurite, and for gs:// a SeaweedFS that a proxy signs for."""

import random
import re
import secrets
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from naign.cli.data import pack as pack_command
from naign.data.format.audit import verify
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.errors import Conflict, InputError, Unavailable
from naign.observe.doctor import preflight
from naign.storage.base import Store
from naign.storage.clouds import Upload, forget_clients
from naign.storage.store import open_store
from tests.conftest import SMALL, Program
from tests.data.numbered import numbered
from tests.proxy import FaultProxy, Faults
from tests.servers import S3Server
from tests.storage.azurite import PROGRAM, Azurite

MIB = 1 << 20
DATA = random.Random(0).randbytes(12 * MIB + 12_345)
needs_azurite = pytest.mark.skipif(PROGRAM is None, reason="needs azurite-blob: npm install -g azurite")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short waits, small parts, and clients that are made from this test's environment."""
    monkeypatch.setattr("naign.storage.retry.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("naign.storage.clouds.WRITE_PART", 5 * MIB)
    forget_clients()
    yield
    forget_clients()


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with Azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def container(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new container, as "az://name"."""
    for name, value in azurite.environment.items():
        monkeypatch.setenv(name, value)
    return azurite.container(f"c{secrets.token_hex(8)}")


@pytest.fixture
def google(bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of SeaweedFS as "gs://name": Google's XML requests are S3's, but for the signature, which is added."""
    keys = Credentials(s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"])
    pool = urllib3.PoolManager(16)

    class Signing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            passed = {key: value for key, value in self.headers.items() if key.lower() in ("range", "if-match")}
            path, _, query = self.path.partition("?")  # signed as S3 reads it: without %2F
            target = f"{s3.endpoint}{quote(unquote(path), safe='/~')}?{query}".rstrip("?")
            request = AWSRequest(self.command, target, headers=passed, data=body)
            S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
            sent = dict(request.headers.items())
            reply = pool.request(self.command, request.url, body=body, headers=sent, retries=False)
            self.send_response(reply.status)
            for key, value in reply.headers.items():
                if key.lower() in ("etag", "last-modified", "content-range", "content-type"):
                    self.send_header(key, value)
            is_head = self.command == "HEAD"
            self.send_header("Content-Length", reply.headers["Content-Length"] if is_head else str(len(reply.data)))
            self.end_headers()
            self.wfile.write(b"" if is_head else reply.data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Signing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    yield bucket.replace("s3://", "gs://")
    server.shutdown()


@pytest.fixture(params=[pytest.param("container", marks=needs_azurite), "google"])
def place(request: pytest.FixtureRequest) -> str:
    address: str = request.getfixturevalue(request.param)
    return address


@pytest.fixture
def store(place: str) -> Store:
    return open_store(f"{place}/some/where")


def test_there_and_back(store: Store, place: str) -> None:
    assert store.list() == store.folders() == []
    for name, data in {"b": b"12345", "a": b"1", "ä b+c%20?#.tar": b"odd", "empty": b""}.items():
        store.put(name, data)
    before = store.version("a")
    store.put("a", b"123")
    store.size("a")
    assert store.version("a") != before
    names = ["a", "b", "empty", "ä b+c%20?#.tar"]
    assert store.list() == names
    assert store.size("a") == 3 and store.read("b") == b"12345" and store.read("ä b+c%20?#.tar") == b"odd"
    assert store.read("b", 1, 3) == b"23" and store.read("empty") == b"".join(store.pieces("empty")) == b""
    assert store.url("a") == f"{place}/some/where/a"
    open_store(f"{place}/some").put("beside", b"")
    open_store(f"{place}/some/where/deeper").put("below", b"")
    assert store.list() == names and store.folders() == ["deeper"]
    assert open_store(f"{place}/some/where/").list() == names and open_store(place).folders() == ["some"]
    store.delete("a")
    store.delete("a")
    assert not store.exists("a") and store.exists("b")
    with pytest.raises(InputError, match=f"{place}/some/where/a: no such object"):
        store.read("a")
    with pytest.raises(InputError, match="5 bytes where 9 were expected: truncated"):
        store.read("b", 0, 9)


def test_files_in_parts_appear_whole_or_not_at_all(store: Store) -> None:
    with store.write("a") as target:
        for start in range(0, len(DATA), MIB):
            assert target.write(memoryview(DATA)[start : start + MIB]) == len(DATA[start : start + MIB])
    assert store.read("a") == DATA and b"".join(store.pieces("a")) == DATA
    for error in (InputError, OSError, KeyboardInterrupt):
        with pytest.raises(error), store.write("b") as target:
            target.write(DATA)
            raise error(28, "mine")
    assert store.list() == ["a"]


def test_what_is_stored_is_read_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Upload.write

    def flipped(upload: Upload, data: bytes) -> int:
        crc = upload.crc
        written = write(upload, b"X" + data[1:])
        upload.crc = crc ^ 1
        return written

    monkeypatch.setattr(Upload, "write", flipped)
    with pytest.raises(Conflict, match="5 bytes, CRC-32 .* just after 5 bytes, .*, were written: another program"):
        store.put("a", b"12345")


def test_a_file_that_is_replaced_while_it_is_read(store: Store, place: str) -> None:
    store.put("a", b"12345")
    assert store.read("a", 0, 2) == b"12"
    open_store(f"{place}/some/where").put("a", b"abcde")
    with pytest.raises(InputError, match="/a: replaced while it was being read: verify the data set"):
        store.read("a", 2, 5)


def test_no_such_bucket(place: str) -> None:
    store = open_store(f"{place}-none/there")
    for ask in (store.list, lambda: store.size("a"), lambda: store.exists("a"), lambda: store.put("a", b"")):
        with pytest.raises(InputError, match=f"{place}-none: there is no such bucket: make it first"):
            ask()


def test_a_data_set_is_packed_verified_and_read(place: str, packed: str) -> None:
    pack(numbered(), f"{place}/set", shards=4, progress=False)
    assert verify(f"{place}/set", progress=False).samples == 28
    assert read_split(f"{place}/set", "train")[0].equal(read_split(packed, "train")[0])


@needs_azurite
def test_who_may_only_read_is_told_before_anything_is_read(
    azurite: Azurite, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight(str(tmp_path), f"{container}/run", 1) == [] and open_store(f"{container}/run").list() == []
    open_store(f"{container}/run").put("a", b"1")
    for name, value in azurite.reader().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    forget_clients()
    assert open_store(f"{container}/run").read("a") == b"1" and open_store(f"{container}/run").list() == ["a"]
    denied = rf"{container}/(run|set)/preflight: access denied \(403 Forbidden, Authoriz\w+\): check the credentials"
    with pytest.raises(InputError, match=f"run.remote cannot be written: {denied}") as refused:
        preflight(str(tmp_path), f"{container}/run", 1)
    assert "sig" not in str(refused.value)
    with pytest.raises(InputError, match=f"--to cannot be written: {denied}"):
        pack_command("folder", to=f"{container}/set", root=tmp_path / "nowhere", size="8")


@needs_azurite
def test_credentials_that_do_not_do(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(container)
    for key, message in (
        ("QUJD", r"access denied \(403 Forbidden.*check the credentials"),
        ("?", "Invalid Access Key"),
    ):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", key)
        forget_clients()
        for ask in (store.list, lambda: store.size("a"), lambda: store.put("a", b"")):
            with pytest.raises(InputError, match=f"{container}.*{message}"):
                ask()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    forget_clients()
    with pytest.raises(InputError, match="Account must be specified.*: set AZURE_STORAGE_ACCOUNT_NAME and "):
        store.list()


@needs_azurite
def test_through_faults(azurite: Azurite, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(container)
    with FaultProxy("127.0.0.1", azurite.port) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.endpoint(proxy.port))
        forget_clients()
        proxy.faults = Faults(errors=0.3, refuse=0.1, reset_every=(MIB, 4 * MIB))
        for _ in range(3):
            store.put("a", DATA)
            assert store.read("a") == DATA
        assert store.tally.retries > 3 and proxy.counts["reset"] and proxy.counts["error"]
        proxy.faults = Faults(refusing=True)
        for ask in (store.list, lambda: store.size("a"), lambda: store.put("a", DATA)):
            with pytest.raises(
                Unavailable, match="az://.*: given up after 10 attempts; the last failed with .*HTTP error"
            ):
                ask()
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.endpoint(azurite.port).replace("http:", "https:"))
        forget_clients()
        with pytest.raises(InputError, match="InvalidContentType"):
            store.list()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://", "no bucket: write gs://bucket/prefix"),
        ("az:c/data", "az:c/data: write az://bucket/prefix"),
        ("az://c/a/../b", "an empty, '.' or '..' part"),
        ("gs://me:secret@example.org/data", "gs://: the address holds a user"),
        ("abfs://c:secret@acc.dfs.core.windows.net/data", "abfs://: the address has a user, password"),
        ("az://c/data?sv=2023&sig=secret", "az://: the address holds a user or a password, or a query"),
        ("gs://a bucket/data", "gs://: the address has a user, password or query, or no plain name"),
    ],
)
def test_addresses_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        open_store(path)
    assert "secret" not in str(refused.value)


def test_credentials_of_a_machine_that_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "account").write_text('{"type": "external_account"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account"))
    with pytest.raises(InputError, match="gs://bucket: .*unknown variant `external_account`"):
        open_store("gs://bucket").list()
    assert open_store("abfs://c@acc.dfs.core.windows.net/x").url("a") == "abfs://c@acc.dfs.core.windows.net/x/a"


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "naign.storage.clouds")
    with pytest.raises(InputError, match=r"gs://bucket: cannot open gs:// paths \(.*\): pip install obstore"):
        open_store("gs://bucket")


@needs_azurite
@pytest.mark.slow
def test_a_run_is_mirrored_and_resumed_from_there(
    azurite: Azurite, container: str, digits: str, train: Program, naign: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"--data.path={digits}", *SMALL, f"--run.remote={container}/run", "--resume=changed"]
    for run, images in (("one", 256), ("two", 512)):
        done = train(*options, f"--run.path={run}", f"--train.images={images}")
        assert done.returncode == 0, done.stderr
    assert "goes on with another train.images: 256 there" in done.stderr
    checkpoints = open_store(f"{container}/run/checkpoints").folders()
    assert len(checkpoints) == 2 and "metrics.jsonl" in open_store(f"{container}/run").list()
    done = naign("sample", f"{container}/run", "--n", "4", "--to", "samples.png")
    assert done.returncode == 0, done.stderr
    for name, value in azurite.reader().items():
        monkeypatch.setenv(name, value)
    done = train(*options, "--run.path=three", "--train.images=768")
    assert done.returncode == 2 and "train: error: run.remote cannot be written: az://" in done.stderr
    assert "Traceback" not in done.stderr
