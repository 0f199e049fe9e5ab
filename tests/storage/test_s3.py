"""The S3 store on a real server: there and back, errors that say what is wrong, and faults in passing."""

import hashlib
import json
import multiprocessing
import pickle
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import webdataset
from botocore.exceptions import ClientError

from naign.data.format.writer import pack
from naign.errors import InputError, Unavailable
from naign.storage.base import Store
from naign.storage.retry import at_most
from naign.storage.s3 import S3Store
from naign.storage.s3_client import client, forget_clients
from naign.storage.store import open_store
from tests.data.numbered import numbered
from tests.proxy import FaultProxy, Faults
from tests.servers import S3Server
from tests.streams import gopen

MIB = 1 << 20
DATA = random.Random(0).randbytes(3 * MIB + 12_345)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that are too short for a network, and short enough for tests."""
    monkeypatch.setattr("naign.storage.s3_client.SILENCE", 1.0)
    monkeypatch.setattr("naign.storage.retry.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 0.05)


@pytest.fixture
def store(bucket: str) -> Store:
    return open_store(f"{bucket}/some/where")


def unfinished(s3: S3Server, bucket: str) -> list[str]:
    """Keys of the uploads that were begun and neither completed nor aborted."""
    answer = s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in answer.get("Uploads", [])]


def test_there_and_back(store: Store, bucket: str) -> None:
    assert store.list() == []
    store.put("b", b"12345")
    store.put("a", b"1")
    store.put("a", b"123")
    store.put("ä b+c%20?#.tar", b"odd")
    store.put("empty", b"")
    assert store.list() == ["a", "b", "empty", "ä b+c%20?#.tar"]
    assert store.size("a") == 3 and store.read("b") == b"12345" and store.read("ä b+c%20?#.tar") == b"odd"
    assert store.read("empty") == b"".join(store.pieces("empty")) == b"" and store.size("empty") == 0
    assert store.url("a") == f"{bucket}/some/where/a"
    open_store(f"{bucket}/some").put("beside", b"")
    open_store(f"{bucket}/some/where/deeper").put("below", b"")
    assert store.list() == ["a", "b", "empty", "ä b+c%20?#.tar"]
    assert open_store(f"{bucket}/some/where/").list() == store.list() and open_store(bucket).list() == []
    store.delete("a")
    store.delete("a")
    assert "a" not in store.list()
    with pytest.raises(InputError, match=f"{bucket}/some/where/a: no such object"):
        store.read("a")


@pytest.mark.parametrize("part", [1000, 999_983, 8 * MIB])
def test_ranges_and_streams(store: Store, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr("naign.storage.resumed.PART", part)
    data = DATA if part > 1000 else DATA[:54_321]
    store.put("a", data)
    size = len(data)
    assert store.read("a") == data
    for first, last in [(0, 1), (0, size), (999, 1001), (1000, 2000), (size - 1, size), (5, 5), (size, size)]:
        assert store.read("a", first, last) == data[first:last]
    assert store.read("a", 1234) == data[1234:] and store.read("a", size) == b""
    taken = store.tally.take()
    assert taken.bytes >= 2 * size and not taken.cached and not taken.reread
    assert b"".join(store.pieces("a")) == data
    with pytest.raises(InputError, match=f"where/a: {size} bytes where {size + 1} were expected: truncated: copy it"):
        store.read("a", 0, size + 1)


def test_a_stream_that_is_closed_early_ends_its_threads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("naign.storage.resumed.PART", 10_000)
    store.put("a", DATA)
    asking: set[threading.Thread] = set()
    client().meta.events.register("before-call.s3", lambda **_: asking.add(threading.current_thread()))
    with closing(store.pieces("a")) as pieces:
        assert next(pieces) == DATA[:10_000]
    fetching = [thread for thread in asking if thread.name == "fetch"]
    assert fetching
    for thread in fetching:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.slow
def test_more_names_than_a_page_of_a_listing(s3: S3Server, bucket: str) -> None:
    client = s3.client(max_pool_connections=8)
    names = [f"{number:04d}" for number in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"x/{name}"), names))
    assert open_store(f"{bucket}/x").list() == names


@pytest.mark.parametrize("size", [5 * MIB, 5 * MIB + 1, 28 * MIB + 5])
def test_writing_streams_in_parts(
    s3: S3Server, store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("naign.storage.s3.WRITE_PART", 5 * MIB)
    data = (DATA * 10)[:size]
    store.put("a", b"old")
    with store.write("a") as target:
        for start in range(0, size, MIB):
            assert target.write(memoryview(data)[start : start + MIB]) == len(data[start : start + MIB])
            assert len(target._buffer) <= 6 * MIB  # type: ignore[attr-defined]
        assert unfinished(s3, bucket) == (["some/where/a"] if size > 5 * MIB else [])
        assert open_store(store.path).read("a") == b"old" and store.list() == ["a"]
    assert store.read("a") == data and store.size("a") == size
    answer = s3.client().head_object(Bucket=bucket.removeprefix("s3://"), Key="some/where/a")
    assert ("-" in answer["ETag"]) == (size > 5 * MIB) and unfinished(s3, bucket) == []


@pytest.mark.parametrize("size", [10, 12 * MIB])
def test_what_is_not_finished_never_appears(
    s3: S3Server, store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("naign.storage.s3.WRITE_PART", 5 * MIB)
    with pytest.raises(KeyError), store.write("a") as target:
        target.write(bytes(size))
        raise KeyError
    assert store.list() == [] and unfinished(s3, bucket) == []


def test_what_is_stored_is_checked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(name: str) -> int:
        open_store(store.path).put(name, b"54321")  # of the same size
        return S3Store.size(store, name)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "size", meanwhile)
    with pytest.raises(InputError, match="where/a: 5 bytes, ETag .* another program writes there too"):
        store.put("a", b"12345")


Params = dict[str, Any]


def answers(change: Callable[[Params], object]) -> None:
    """Let a function change each parsed answer of this process's client."""
    client().meta.events.register("after-call.s3", lambda parsed, **_: change(parsed))


@pytest.fixture
def requests(bucket: str) -> list[str]:
    """The names of the requests that this process makes from now on."""
    made: list[str] = []
    client().meta.events.register("before-call.s3", lambda model, **_: made.append(model.name))
    return made


def test_one_file_is_asked_for_alone(store: Store, bucket: str, requests: list[str]) -> None:
    store.put("a", b"1")
    open_store(f"{store.path}/deeper").put("below", b"")
    requests.clear()
    assert store.exists("a") and set(requests) == {"HeadObject"}
    assert not any(store.exists(name) for name in ("b", "deeper", "a/b"))
    assert not open_store(f"{bucket}/nowhere").exists("a") and "ListObjectsV2" not in requests


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "nothing"])
@pytest.mark.parametrize("size", [10, 12 * MIB])
def test_etags_that_are_no_md5(
    s3: S3Server,
    store: Store,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    size: int,
    checksums: bool,
) -> None:
    """As of S3 Express One Zone, which gives checksums, and of servers that give neither."""
    monkeypatch.setattr("naign.storage.s3.WRITE_PART", 5 * MIB)

    def disguised(etag: str) -> str:
        return f'"{etag.strip(chr(34))[::-1]}{"" if checksums else "-opaque"}"'

    def plain(etag: str) -> str:
        return f'"{etag.strip(chr(34)).removesuffix("-opaque")[::-1]}"'

    def disguise(parsed: Params) -> None:
        if "ETag" in parsed:
            parsed["ETag"] = disguised(parsed["ETag"])
        if not checksums:
            parsed.pop("ChecksumCRC32", None)

    def undo(params: Params, **_: object) -> None:
        if "IfMatch" in params:
            params["IfMatch"] = plain(params["IfMatch"])
        for name in ("ChecksumCRC32", "ChecksumAlgorithm"):
            if not checksums:
                params.pop(name, None)
        for part in params.get("MultipartUpload", {}).get("Parts", []):
            part["ETag"] = plain(part["ETag"])

    answers(disguise)
    client().meta.events.register("before-parameter-build.s3", undo)
    data = (DATA * 4)[:size]
    store.put("a", data)
    assert "stored other bytes" not in caplog.text
    assert b"".join(store.pieces("a")) == data
    answer = s3.client().head_object(Bucket=bucket.removeprefix("s3://"), Key="some/where/a", ChecksumMode="ENABLED")
    assert ("ChecksumCRC32" in answer) == checksums and unfinished(s3, bucket) == []


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "InvalidArgument", "Unsupported header '{header}' received for this API call."),
        (501, "NotImplemented", "Header '{header}' with value 'CRC32' not implemented"),
    ],
)
def test_a_server_that_refuses_checksums(
    store: Store, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    monkeypatch.setattr("naign.storage.s3.WRITE_PART", 5 * MIB)
    refused = []

    def refuse(model: Any, params: Params, **_: object) -> None:
        for header in params["headers"]:
            if header.lower().startswith("x-amz-checksum"):
                refused.append(model.name)
                error = {"Code": code, "Message": message.format(header=header)}
                raise ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}, model.name)

    client().meta.events.register("before-call.s3", refuse)
    store.put("a", (DATA * 4)[: 12 * MIB])
    store.put("b", DATA)
    assert refused == ["CreateMultipartUpload"]
    assert open_store(store.path).read("a") == (DATA * 4)[: 12 * MIB] and store.read("b") == DATA


@pytest.mark.parametrize("field", ["ChecksumCRC32", "ETag"])
def test_a_server_that_stored_other_bytes_is_given_them_again(
    store: Store, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    wrong = {"ChecksumCRC32": "AAAAAA==", "ETag": f'"{32 * "0"}"'}

    def once(parsed: Params) -> None:
        if "ChecksumCRC32" in parsed and wrong:
            if field == "ETag":
                del parsed["ChecksumCRC32"]
            parsed[field] = wrong[field]
            wrong.clear()

    answers(once)
    store.put("a", DATA)
    assert caplog.text.count("stored other bytes") == 1 and store.read("a") == DATA


def test_webdataset_reads_streams(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("naign.storage.resumed.PART", 1000)
    pack(numbered(), store.path, shards=2, progress=False)
    monkeypatch.setitem(webdataset.gopen_schemes, "s3", gopen)
    urls = [store.url(f"train-{number:05d}.tar") for number in range(2)]
    images = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8").to_tuple("png"))
    assert sorted(int(image[0, 0]) for (image,) in images) == list(range(23))
    with gopen(urls[0]) as stream:
        data = store.read("train-00000.tar")
        assert stream.read(5) + stream.read(0) + stream.read() == data and stream.read(1) == b""
    with pytest.raises(InputError, match="where/none: no such object"):
        gopen(store.url("none"))
    with pytest.raises(InputError, match="streams are only read"):
        gopen(urls[0], "wb")


def test_pickling(store: Store) -> None:
    store.put("a", DATA[:5000])
    store.size("a")
    copy: Store = pickle.loads(pickle.dumps(store))
    assert copy.read("a") == DATA[:5000] and copy.list() == ["a"] and copy.path == store.path


# --- what a user can put right


Action = Callable[[Store], object]

ACTIONS: dict[str, Action] = {
    "list": lambda store: store.list(),
    "size": lambda store: store.size("a"),
    "exists": lambda store: store.exists("a"),
    "read": lambda store: store.read("a"),
    "pieces": lambda store: next(store.pieces("a")),
    "put": lambda store: store.put("a", b"1"),
    "delete": lambda store: store.delete("a"),
}


def refusal(s3: S3Server, action: str, path: str) -> str:
    """The message, which names the object, and gives no secret away."""
    with pytest.raises(InputError) as caught:
        ACTIONS[action](open_store(path))
    message = str(caught.value)
    assert message.startswith(f"{path}/" if action == "list" else f"{path}/a")
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in message and "not-the-secret" not in message
    return message


def test_a_missing_bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for action in ACTIONS:
        message = refusal(s3, action, "s3://no-such-bucket/x")
        assert "there is no bucket no-such-bucket: make it first, or check the name and AWS_ENDPOINT_URL" in message
    monkeypatch.setattr("naign.storage.s3.WRITE_PART", 5 * MIB)
    with (
        pytest.raises(InputError, match="x/a: there is no bucket no-such"),
        open_store("s3://no-such/x").write("a") as a,
    ):
        a.write(bytes(11 * MIB))


def test_a_missing_object(s3: S3Server, bucket: str) -> None:
    for action in ("size", "read", "pieces"):
        assert "/x/a: no such object: check the path" in refusal(s3, action, f"{bucket}/x")


def test_names_that_no_bucket_can_have(s3: S3Server) -> None:
    for action in ACTIONS:
        assert "Bad!" in refusal(s3, action, "s3://Bad!/x")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, r"access denied \((SignatureDoesNotMatch|403)\): check the cred"),
        ({"AWS_ACCESS_KEY_ID": "unknown"}, r"access denied \((InvalidAccessKeyId|403)\): check the credentials"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            r"access denied \((AccessDenied|403)\): .* no credentials were found, .*: set AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_SECRET_ACCESS_KEY": None}, r"missing: AWS_SECRET_ACCESS_KEY: set AWS_ACCESS_KEY_ID and"),
        ({"AWS_PROFILE": "nowhere"}, r"profile \(nowhere\) could not be found: set AWS_ACCESS_KEY_ID"),
        pytest.param(
            {"AWS_ENDPOINT_URL": "nonsense"},
            r"nonsense.*AWS_ENDPOINT_URL",
        ),
        ({"AWS_ENDPOINT_URL": "http://me:not-to-be-read@127.0.0.1:1"}, r"the server's address holds a user"),
        ({"AWS_ENDPOINT_URL": "me:not-to-be-read@nonsense"}, r"\.\.\.@nonsense"),
    ],
    ids=["secret", "key", "none", "half", "profile", "endpoint", "password", "password too"],
)
def test_credentials_that_do_not_do(
    s3: S3Server,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str | None],
    message: str,
) -> None:
    open_store(f"{bucket}/x").put("a", b"1")
    for name, value in changed.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    forget_clients()
    for action in ACTIONS:
        found = refusal(s3, action, f"{bucket}/x")
        assert re.search(message, found), (action, found)
        assert "not-to-be-read" not in found, action
        assert ("no credentials were found" in found) == (changed.get("AWS_ACCESS_KEY_ID", "") is None), action


@pytest.mark.parametrize("status", [301, 308])
def test_a_server_that_redirects(s3: S3Server, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Redirect(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(status)
            self.send_header("Location", f"https://elsewhere{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        forget_clients()
        messages = [refusal(s3, action, "s3://bucket/x") for action in ACTIONS]
        server.shutdown()
    for message in messages:
        assert f"the server redirects ({status}) to https://elsewhere/bucket" in message
        assert "(http or https? another region?): check AWS_ENDPOINT_URL" in message and "\n" not in message


def test_a_public_bucket_needs_no_account(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(f"{bucket}/x").put("a", DATA)
    name = bucket.removeprefix("s3://")
    everyone = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"],
    }
    s3.client().put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [everyone]}))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    forget_clients()
    store = open_store(f"{bucket}/x")
    assert store.list() == ["a"] and store.read("a") == b"".join(store.pieces("a")) == DATA
    assert "no credentials were found" in refusal(s3, "put", f"{bucket}/x")


@pytest.mark.parametrize("again", [b"9" * len(DATA), b"short", None], ids=["same size", "shorter", "deleted"])
def test_an_object_that_changes_while_it_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, again: bytes | None
) -> None:
    monkeypatch.setattr("naign.storage.resumed.PART", 100_000)
    store.put("a", DATA)
    known = open_store(store.path)
    assert known.size("a") == len(DATA)
    pieces = store.pieces("a")
    assert next(pieces) == DATA[:100_000]
    other = open_store(store.path)
    other.delete("a") if again is None else other.put("a", again)
    message = "where/a: no such object" if again is None else "where/a: replaced while it was being read"
    with pytest.raises(InputError, match=message):
        b"".join(pieces)
    for read in (lambda: known.read("a"), lambda: known.read("a", 50, 60)):
        with pytest.raises(InputError, match=message):
            read()


# --- what passes


def flaky(store: Store) -> Store:
    """The same path anew: nothing known, nothing counted."""
    return open_store(store.path)


def test_a_server_that_is_down(store: Store, proxy: FaultProxy) -> None:
    store.put("a", DATA)
    store.size("a")
    proxy.faults = Faults(refusing=True)
    with pytest.raises(Unavailable, match=rf"read {store.url('a')}, byte 0: given up after 10 attempts; .*Endpoint"):
        store.read("a")
    assert store.tally.take().retries == 9
    for action in ("list", "size", "pieces", "put", "delete"):
        with pytest.raises(Unavailable, match=rf"{store.path}/.*: given up after 10 attempts; .*EndpointConnection"):
            ACTIONS[action](flaky(store))
    proxy.faults = Faults()
    assert store.read("a") == DATA


def test_a_server_that_goes_down_in_the_middle(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("naign.storage.resumed.PART", 100_000)
    store.put("a", DATA)
    pieces = store.pieces("a")
    assert next(pieces) == DATA[:100_000]
    proxy.faults = Faults(refusing=True)
    with pytest.raises(Unavailable, match=rf"read {store.url('a')}, byte \d+00000: given up after 10 attempts"):
        b"".join(pieces)


def test_a_short_absence_is_waited_out(store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 1.0)
    store.put("a", DATA)
    proxy.faults = Faults(refusing=True)
    back = threading.Timer(0.1, lambda: setattr(proxy, "faults", Faults()))
    back.start()
    fresh = flaky(store)
    assert fresh.read("a") == DATA and fresh.tally.retries
    back.join()


@pytest.mark.parametrize("part", [200_000, 8 * MIB])
@pytest.mark.parametrize(
    ("faults", "kinds"),
    [
        (Faults(errors=0.3), ["error"]),
        (Faults(reset_every=(MIB + 100_000, 3 * MIB)), ["reset"]),
        (Faults(refuse=0.3, reset_every=(MIB + 100_000, 3 * MIB)), ["refuse", "reset"]),
        (Faults(stall=0.3), ["stall"]),
        (Faults(refuse=0.1, errors=0.1, stall=0.03, reset_every=(MIB + 100_000, 3 * MIB)), ["error", "reset"]),
    ],
    ids=["errors", "resets", "refusals", "stalls", "all"],
)
@pytest.mark.slow
def test_reading_through_faults(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, faults: Faults, kinds: list[str], part: int
) -> None:
    monkeypatch.setattr("naign.storage.resumed.PART", part)
    monkeypatch.setattr("naign.storage.s3_client.SILENCE", 0.5)
    monkeypatch.setattr("naign.storage.retry.ATTEMPTS", 20)
    store.put("a", DATA)
    forget_clients()
    proxy.faults = faults
    fresh = flaky(store)
    while not all(proxy.counts[kind] for kind in kinds):
        assert fresh.list() == ["a"] and fresh.size("a") == len(DATA)
        assert fresh.read("a", 7) == DATA[7:]
        assert b"".join(fresh.pieces("a")) == DATA
    assert fresh.tally.retries > 0
    assert fresh.tally.bytes % (2 * len(DATA) - 7) == 0  # what was received twice counts once


def test_who_can_do_without_the_answer_waits_less_for_it() -> None:
    with at_most(1):
        assert client().meta.config.connect_timeout == client().meta.config.read_timeout == 0.2
    assert client().meta.config.connect_timeout == client().meta.config.read_timeout == 1.0


def test_bodies_that_break_off_early(store: Store, proxy: FaultProxy) -> None:
    store.put("a", DATA)
    proxy.faults = Faults(reset_every=(100_000, 300_000))
    assert flaky(store).read("a") == DATA and proxy.counts["reset"] >= 10


@pytest.mark.slow
def test_writing_through_faults(
    s3: S3Server, store: Store, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("naign.storage.s3.WRITE_PART", 5 * MIB)
    monkeypatch.setattr("naign.storage.retry.ATTEMPTS", 100)
    data = (DATA * 9)[: 26 * MIB + 3]
    over = threading.Event()

    def restarts() -> None:
        for _ in range(6):
            proxy.faults = Faults(errors=0.15, refuse=0.1, stall=0.05, reset_every=(100, 3000))
            if over.wait(0.25):
                return
            proxy.faults = Faults(refusing=True)  # resets the uploads that are on their way
            over.wait(0.01)
        proxy.faults = Faults(errors=0.15, refuse=0.1, stall=0.05, reset_every=(100, 3000))

    thread = threading.Thread(target=restarts)
    thread.start()
    try:
        for name in ("a", "b"):
            with store.write(name) as target:
                for start in range(0, len(data), MIB):
                    target.write(data[start : start + MIB])
        for number in range(20):
            store.put(f"small-{number}", DATA[: 1000 * number])
    finally:
        over.set()
        thread.join()
        proxy.faults = Faults()
    assert store.tally.retries > 5 and proxy.counts["error"] > 0
    fresh = flaky(store)
    assert [hashlib.sha256(fresh.read(name)).digest() for name in "ab"] == [hashlib.sha256(data).digest()] * 2
    assert all(fresh.read(f"small-{number}") == DATA[: 1000 * number] for number in range(20))


def test_an_upload_is_done_even_if_the_answer_is_lost(
    s3: S3Server, store: Store, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("naign.storage.s3.WRITE_PART", 5 * MIB)
    monkeypatch.setattr("naign.storage.retry.ATTEMPTS", 1000)
    healed = threading.Event()

    def heal() -> None:
        while not proxy.counts["reset"] and not healed.wait(0.001):
            pass
        proxy.faults = Faults()

    with store.write("a") as target:
        target.write((DATA * 4)[: 12 * MIB])
        proxy.faults = Faults(reset_every=(1, 1))  # of what follows only the answer to the completion has a body
        thread = threading.Thread(target=heal)
        thread.start()
    healed.set()
    thread.join()
    assert proxy.counts["reset"] and store.tally.retries
    assert flaky(store).read("a") == (DATA * 4)[: 12 * MIB] and unfinished(s3, bucket) == []


# --- processes


def digest(store: Store) -> str:
    return hashlib.sha256(store.read("a")).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_a_program_starts(store: Store, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr("naign.storage.resumed.PART", 100_000)
    store.put("a", DATA)
    pieces = store.pieces("a")  # its threads read on while the processes start
    start = next(pieces)
    expected = hashlib.sha256(DATA).hexdigest()
    with multiprocessing.get_context(method).Pool(2) as pool:
        running = pool.map_async(digest, [store] * 6)
        assert digest(store) == expected
        assert running.get(60) == [expected] * 6
    assert start + b"".join(pieces) == DATA and digest(store) == expected


def test_bodies_that_end_early_are_no_busy_loop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a byte of progress each counts as a failure, after which there is a pause."""
    store.put("a", bytes(1000))
    requests = []
    monkeypatch.setattr(type(store), "_range", lambda *given: requests.append(given) or iter(()))
    with at_most(3), pytest.raises(Unavailable, match="given up after 3 attempts; .*the body ended 1000 bytes early"):
        store.read("a")
    assert len(requests) == 3
