"""The S3 store on a real server: there and back, errors that say what is wrong, and faults in passing."""

import hashlib
import json
import multiprocessing
import pickle
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from naign.errors import InputError, Unavailable
from naign.storage.s3_client import client, forget_clients
from naign.storage.store import open_store
from tests.hosts.waiting import until
from tests.proxy import Faults

MIB = 1 << 20
DATA = random.Random(0).randbytes(3 * MIB + 12_345)


def unfinished(s3, bucket):
    """Keys of the uploads that were begun and neither completed nor aborted."""
    answer = s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in answer.get("Uploads", [])]


@pytest.mark.parametrize("part", [1000, 8 * MIB])
def test_ranges_and_streams(
    store,
    monkeypatch,
    part,
):
    monkeypatch.setattr("naign.storage.network.RANGE", part)
    data = DATA if part > 1000 else DATA[:54_321]
    store.put("a", data)
    size = len(data)
    assert store.read("a") == data
    for first, last in (
        (0, 1),
        (0, size),
        (999, 1001),
        (1000, 2000),
        (size - 1, size),
        (size, size),
    ):
        assert store.read("a", first, last) == data[first:last]
    assert store.read("a", 1234) == data[1234:]
    assert store.read("a", size) == b""
    taken = store.tally.take()
    assert taken.bytes >= 2 * size
    assert not taken.reread
    assert b"".join(store.pieces("a")) == data
    with pytest.raises(InputError, match=f"where/a: {size} bytes where {size + 1} were expected: truncated: copy it"):
        store.read("a", 0, size + 1)


def test_a_stream_that_is_closed_early_ends_its_threads(store, monkeypatch):
    monkeypatch.setattr("naign.storage.network.RANGE", 10_000)
    store.put("a", DATA)
    asking = set()
    client().meta.events.register("before-call.s3", lambda **_: asking.add(threading.current_thread()))
    with closing(store.pieces("a")) as pieces:
        assert next(pieces) == DATA[:10_000]
    assert "fetch" in {thread.name for thread in asking}
    for thread in asking - {threading.current_thread()}:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.slow
def test_more_names_than_a_page_of_a_listing(s3, bucket):
    client = s3.client(max_pool_connections=8)
    names = [f"{number:04d}" for number in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"x/{name}"), names))
    assert open_store(f"{bucket}/x").list() == names


@pytest.mark.parametrize("size", [5 * MIB, 28 * MIB + 5])
def test_large_objects_are_sent_in_parts(
    s3,
    store,
    bucket,
    size,
):
    data = (DATA * 10)[:size]
    store.put("a", b"old")
    store.put("a", data)
    assert store.read("a") == data
    answer = s3.client().head_object(Bucket=bucket.removeprefix("s3://"), Key="some/where/a", ChecksumMode="ENABLED")
    assert ("-" in answer["ETag"]) == (size > 5 * MIB)
    assert "ChecksumCRC32" in answer
    assert unfinished(s3, bucket) == []


def test_an_upload_that_fails_leaves_nothing_behind(s3, store, bucket):
    def fail(params, **_):
        if params["PartNumber"] == 3:
            assert unfinished(s3, bucket) == ["some/where/a"]
            raise KeyError

    client().meta.events.register("before-parameter-build.s3.UploadPart", fail)
    with pytest.raises(KeyError):
        store.put("a", bytes(12 * MIB))
    assert store.list() == []
    assert unfinished(s3, bucket) == []


@pytest.fixture
def requests(bucket):
    """The names of the requests that this process makes from now on."""
    made = []
    client().meta.events.register("before-call.s3", lambda model, **_: made.append(model.name))
    return made


def test_one_file_is_asked_for_alone(
    store,
    bucket,
    requests,
):
    store.put("a", b"1")
    open_store(f"{store.path}/deeper").put("below", b"")
    requests.clear()
    assert store.exists("a")
    assert set(requests) == {"HeadObject"}
    for name in ("b", "deeper", "a/b"):
        assert not store.exists(name)
    assert not open_store(f"{bucket}/nowhere").exists("a")
    assert "ListObjectsV2" not in requests


@pytest.mark.parametrize("size", [10, 12 * MIB])
@pytest.mark.parametrize("change", ["opaque", "unquoted"])
def test_etags_that_are_not_a_quoted_md5(
    store,
    size,
    change,
):
    """Opaque ones, as of encrypted objects; and answers to HEAD whose ETag has no quotes, where others have them."""

    def disguise(
        parsed,
        model,
        **_,
    ):
        if change == "unquoted" and model.name == "HeadObject" and "ETag" in parsed:
            parsed["ETag"] = parsed["ETag"].strip('"')
        elif change == "opaque" and model.name != "UploadPart" and "ETag" in parsed:
            parsed["ETag"] = f'"{parsed["ETag"].strip(chr(34))[::-1]}"'

    def undo(params, **_):
        if "IfMatch" in params and change == "opaque":
            params["IfMatch"] = f'"{params["IfMatch"].strip(chr(34))[::-1]}"'

    client().meta.events.register("after-call.s3", disguise)
    client().meta.events.register("before-parameter-build.s3", undo)
    data = (DATA * 4)[:size]
    store.put("a", data)
    assert store.read("a") == b"".join(store.pieces("a")) == data


def test_pickling(store):
    store.put("a", DATA[:5000])
    store.size("a")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("a") == DATA[:5000]
    assert copy.list() == ["a"]
    assert copy.path == store.path


# --- what a user can put right


ACTIONS = {
    "list": lambda store: store.list(),
    "size": lambda store: store.size("a"),
    "exists": lambda store: store.exists("a"),
    "read": lambda store: store.read("a"),
    "pieces": lambda store: next(store.pieces("a")),
    "put": lambda store: store.put("a", b"1"),
    "delete": lambda store: store.delete("a"),
}


def refusal(
    s3,
    action,
    path,
):
    """The message, which names the object, and gives no secret away."""
    with pytest.raises(InputError) as caught:
        ACTIONS[action](open_store(path))
    message = str(caught.value)
    assert message.startswith(f"{path}/" if action == "list" else f"{path}/a")
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in message
    assert "not-the-secret" not in message
    return message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "not-the-secret"},
            r"access denied \((SignatureDoesNotMatch|403): .*: check the cre",
        ),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            r"access denied \((AccessDenied|403): .*; no credentials were found, .*: set AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_SECRET_ACCESS_KEY": None}, r"missing: AWS_SECRET_ACCESS_KEY: check .* AWS configuration"),
        ({"AWS_PROFILE": "nowhere"}, r"profile \(nowhere\) could not be found: check .* AWS configuration"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, r"nonsense.*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://me:not-to-be-read@127.0.0.1:1"}, r"the server's address holds a user"),
    ],
    ids=["secret", "none", "half", "profile", "endpoint", "password"],
)
def test_credentials_that_do_not_do(
    s3,
    bucket,
    monkeypatch,
    changed,
    message,
):
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


@pytest.fixture
def web_server(monkeypatch):
    """Makes a web server, which answers each request by a status and headers, the endpoint of S3."""
    servers = []

    def serve(status, headers):
        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value.format(path=self.path))
                self.end_headers()

            do_GET = do_HEAD = do_PUT = do_DELETE = answer

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        forget_clients()

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_that_redirects(s3, web_server):
    web_server(301, {"Location": "https://elsewhere{path}", "Content-Length": "0"})
    for action in ACTIONS:
        message = refusal(s3, action, "s3://bucket/x")
        assert "the server redirects (301) to https://elsewhere/bucket" in message
        assert "(http or https? another region?): check the path, AWS_ENDPOINT_URL" in message
        assert "\n" not in message


@pytest.mark.parametrize("headers", [{"Content-Length": "0"}, {"ETag": "w", "Connection": "close"}])
def test_a_web_page_is_no_store(headers, web_server):
    web_server(200, {"Content-Type": "text/html", **headers})
    with pytest.raises(InputError, match="x/index.json: no S3 store is there: check the path, AWS_"):
        open_store("s3://bucket/x").size("index.json")


def test_a_public_bucket_needs_no_account(
    s3,
    bucket,
    monkeypatch,
):
    open_store(f"{bucket}/x").put("a", DATA)
    monkeypatch.setattr("naign.storage.network.granted", set())
    name = bucket.removeprefix("s3://")
    everyone = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"],
    }
    policy = {"Version": "2012-10-17", "Statement": [everyone]}
    s3.client().put_bucket_policy(Bucket=name, Policy=json.dumps(policy))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    forget_clients()
    store = open_store(f"{bucket}/x")
    assert store.list() == ["a"]
    assert store.read("a") == b"".join(store.pieces("a")) == DATA
    assert "no credentials were found" in refusal(s3, "put", f"{bucket}/x")


# --- what passes


def flaky(store):
    """The same path anew: nothing known, nothing counted."""
    return open_store(store.path)


def test_a_server_that_is_down(
    store,
    proxy,
    monkeypatch,
):
    monkeypatch.setattr("naign.storage.network.RANGE", 100_000)
    store.put("a", DATA)
    pieces = store.pieces("a")
    assert next(pieces) == DATA[:100_000]
    proxy.faults = Faults(refusing=True)
    with pytest.raises(Unavailable, match=rf"read {store.url('a')}, byte \d+00000: given up after 2 s; .*Endpoint"):
        b"".join(pieces)
    assert store.tally.take().retries > 9
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 0.3)
    for action in ("list", "size", "pieces", "put", "delete"):
        with pytest.raises(Unavailable, match=rf"{store.path}/.*: given up after 0 s; .*EndpointConnection"):
            ACTIONS[action](flaky(store))
    proxy.faults = Faults()
    assert store.read("a") == DATA


def test_a_short_absence_is_waited_out(
    store,
    proxy,
    monkeypatch,
):
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 1.0)
    store.put("a", DATA)
    proxy.faults = Faults(refusing=True)
    back = threading.Timer(0.1, lambda: setattr(proxy, "faults", Faults()))
    back.start()
    fresh = flaky(store)
    assert fresh.read("a") == DATA
    assert fresh.tally.retries
    back.join()


@pytest.mark.parametrize(
    "faults",
    [
        Faults(stall=0.3),
        Faults(
            refuse=0.1,
            errors=0.1,
            stall=0.03,
            reset_every=(MIB + 100_000, 3 * MIB),
        ),
    ],
    ids=["stalls", "all"],
)
@pytest.mark.slow
def test_reading_through_faults(
    store,
    proxy,
    monkeypatch,
    faults,
):
    monkeypatch.setattr("naign.storage.network.RANGE", 200_000)
    monkeypatch.setattr("naign.storage.s3_client.SILENCE", 0.5)
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 30.0)
    store.put("a", DATA)
    forget_clients()
    proxy.faults = faults
    fresh = flaky(store)
    for _ in range(3):
        assert fresh.list() == ["a"]
        assert fresh.size("a") == len(DATA)
        assert fresh.read("a", 7) == DATA[7:]
        assert b"".join(fresh.pieces("a")) == DATA
    assert fresh.tally.retries > 0
    assert fresh.tally.bytes % (2 * len(DATA) - 7) == 0  # what was received twice counts once


@pytest.mark.slow
def test_writing_through_faults(
    store,
    proxy,
    monkeypatch,
):
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 120.0)
    faults = Faults(
        errors=0.4,
        refuse=0.1,
        stall=0.05,
        reset_every=(100, 3000),
    )
    proxy.faults = faults
    large = (DATA * 9)[: 26 * MIB + 3]
    written = {"large": large}
    for number in range(20):
        written[f"small-{number}"] = DATA[: 1000 * number]

    def restart():
        proxy.faults = Faults(refusing=True)  # ends the uploads that are on their way
        proxy.faults = faults

    restarts = []
    for seconds in (0.3, 0.6, 0.9):
        restarts.append(threading.Timer(seconds, restart))
        restarts[-1].start()
    for name, data in written.items():
        store.put(name, data)
    for timer in restarts:
        timer.join()
    proxy.faults = Faults()
    assert store.tally.retries > 5
    assert proxy.counts["error"] > 0
    fresh = flaky(store)
    for name, data in written.items():
        assert fresh.read(name) == data


def test_an_upload_is_done_even_if_the_answer_is_lost(
    s3,
    store,
    bucket,
    proxy,
    monkeypatch,
):
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 120.0)
    healed = threading.Event()

    def heal():
        while not proxy.counts["reset"] and not healed.wait(0.001):
            pass
        proxy.faults = Faults()

    def lose_answers():
        if not proxy.counts["reset"]:
            proxy.faults = Faults(reset_every=(1, 1))
            threading.Thread(target=heal).start()

    client().meta.events.register("before-call.s3.CompleteMultipartUpload", lambda **_: lose_answers())
    store.put("a", (DATA * 4)[: 12 * MIB])
    healed.set()
    assert proxy.counts["reset"]
    assert store.tally.retries
    assert flaky(store).read("a") == (DATA * 4)[: 12 * MIB]
    until(lambda: not unfinished(s3, bucket), seconds=30)  # the server clears away after it has answered


# --- processes


def digest(store):
    return hashlib.sha256(store.read("a")).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_a_program_starts(
    store,
    monkeypatch,
    method,
):
    monkeypatch.setattr("naign.storage.network.RANGE", 100_000)
    store.put("a", DATA)
    pieces = store.pieces("a")  # its threads read on while the processes start
    start = next(pieces)
    expected = hashlib.sha256(DATA).hexdigest()
    with multiprocessing.get_context(method).Pool(2) as pool:
        running = pool.map_async(digest, [store] * 6)
        assert digest(store) == expected
        assert running.get(60) == [expected] * 6
    assert start + b"".join(pieces) == DATA
    assert digest(store) == expected


def test_bodies_that_end_early_are_asked_for_after_a_pause(store, hasty, monkeypatch):
    store.put("a", bytes(1000))
    requests = []
    monkeypatch.setattr(type(store), "_range", lambda *given: requests.append(given) or iter(()))
    with pytest.raises(Unavailable, match="given up after 0 s; .*the body ended 1000 bytes early"):
        store.read("a")
    assert 3 <= len(requests) < 200
