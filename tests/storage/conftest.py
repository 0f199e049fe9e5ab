"""Stores for the tests of this folder: buckets of S3 and of Google's kind, found through the environment."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

import pytest
import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from naign.storage.others import OtherStore
from naign.storage.store import open_store


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits too short for a network, and short enough for tests; small parts; nothing is known of any server."""
    monkeypatch.setattr("naign.storage.s3.PART", 5 << 20)
    monkeypatch.setattr("naign.storage.others.PART", 5 << 20)
    monkeypatch.setattr("naign.storage.s3_client.SILENCE", 1.0)
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 2.0)
    monkeypatch.setattr("naign.storage.retry.FIRST_PATIENCE", 0.3)
    monkeypatch.setattr("naign.storage.retry.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("naign.storage.network.granted", set())
    monkeypatch.setattr("naign.storage.network.answered", set())
    OtherStore.forget_client()
    yield
    OtherStore.forget_client()


@pytest.fixture
def hasty(impatient, monkeypatch):
    """Gives up almost at once."""
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 0.3)


class Signing(BaseHTTPRequestHandler):
    """Passes Google's XML requests on to SeaweedFS: they are S3's, but for the signature, which is added."""

    protocol_version = "HTTP/1.1"
    server: Any

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        passed = {key: value for key, value in self.headers.items() if key.lower() in ("range", "if-match")}
        path, _, query = self.path.partition("?")  # signed as S3 reads it: without %2F
        target = f"{self.server.upstream}{quote(unquote(path), safe='/~')}?{query}".rstrip("?")
        request = AWSRequest(
            self.command,
            target,
            headers=passed,
            data=body,
        )
        S3SigV4Auth(self.server.keys, "s3", "us-east-1").add_auth(request)
        reply = self.server.pool.request(
            self.command,
            request.url,
            body=body,
            headers=dict(request.headers.items()),
            retries=False,
        )
        length = str(len(reply.data))
        if self.command == "HEAD":
            length = reply.headers["Content-Length"]
        self.send_response(reply.status)
        self.send_header("Content-Length", length)
        for key, value in reply.headers.items():
            if key.lower() in ("etag", "last-modified", "content-range", "content-type"):
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def google(
    bucket,
    s3,
    monkeypatch,
):
    """A bucket of SeaweedFS as "gs://name"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Signing)
    server.upstream = s3.endpoint
    server.pool = urllib3.PoolManager(16)
    server.keys = Credentials(s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    yield bucket.replace("s3://", "gs://")
    server.shutdown()


@pytest.fixture(params=["bucket", "google"])
def place(request):
    """A new bucket of each kind."""
    address = request.getfixturevalue(request.param)
    return address


@pytest.fixture
def store(bucket):
    """A folder of a new S3 bucket."""
    return open_store(f"{bucket}/some/where")
