"""Each fault of tests/proxy.py as a plain boto3 client meets it, before a real S3 server."""

import io
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from tests.proxy import FaultProxy, Faults
from tests.servers import S3Server

BODY = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def client(s3: S3Server, proxy: FaultProxy) -> Any:
    """A client that talks to the proxy, never tries twice and checks no body itself."""
    return plain(s3, proxy)


def plain(s3: S3Server, proxy: FaultProxy, **options: Any) -> Any:
    once = {"total_max_attempts": 1}
    return s3.client(endpoint=proxy.endpoint, retries=once, response_checksum_validation="when_required", **options)


@pytest.fixture
def put(s3: S3Server, bucket: str) -> Callable[[str, bytes], dict[str, str]]:
    """Store an object beside the proxy; returns where it is, as boto3's arguments."""

    def put(key: str, body: bytes) -> dict[str, str]:
        where = {"Bucket": bucket.removeprefix("s3://"), "Key": key}
        s3.client().put_object(**where, Body=body)
        return where

    return put


Put = Callable[[str, bytes], dict[str, str]]


def test_passes_everything_on(client: Any, proxy: FaultProxy, put: Put) -> None:
    where = put("whole", BODY)
    assert client.get_object(**where)["Body"].read() == BODY
    part = client.get_object(**where, Range="bytes=1000-2000999")
    assert part["Body"].read() == BODY[1000:2_001_000]
    assert client.head_object(**where)["ContentLength"] == len(BODY)
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket=where["Bucket"], Key="missing")
    with pytest.raises(ClientError, match="404"):
        client.head_object(Bucket=where["Bucket"], Key="missing")
    client.delete_object(**where)
    assert client.list_objects_v2(Bucket=where["Bucket"])["KeyCount"] == 0
    mine = [method for method, path in proxy.requests if where["Bucket"] in path]
    assert mine == ["GET", "GET", "HEAD", "GET", "HEAD", "DELETE", "GET"], proxy.requests
    assert proxy.counts["requests"] == len(proxy.requests)
    assert proxy.counts["bytes"] >= len(BODY) + 2_000_000
    assert set(proxy.counts) == {"requests", "bytes"}


def test_passes_uploads_on(s3: S3Server, client: Any, proxy: FaultProxy, bucket: str) -> None:
    name, body = bucket.removeprefix("s3://"), BODY * 2
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    client.upload_fileobj(io.BytesIO(body), name, "parts", Config=parts)
    client.put_object(Bucket=name, Key="one", Body=BODY)
    assert proxy.counts["requests"] == 1 + 2 + 1 + 1
    assert s3.client().get_object(Bucket=name, Key="parts")["Body"].read() == body
    assert s3.client().get_object(Bucket=name, Key="one")["Body"].read() == BODY


def test_resets_in_the_middle_of_a_body(client: Any, proxy: FaultProxy, put: Put) -> None:
    where = put("key", BODY)
    proxy.faults = Faults(reset_every=(1_000_000, 1_000_000))
    received, resets = b"", 0
    while len(received) < len(BODY):
        body = client.get_object(**where, Range=f"bytes={len(received)}-")["Body"]
        try:
            while piece := body.read(10_000):
                received += piece
        except ResponseStreamingError as error:
            assert "reset" in str(error)
            resets += 1
    assert received == BODY
    assert resets == proxy.counts["reset"] == (proxy.counts["bytes"] - 1) // 1_000_000


def test_stalls_in_the_middle_of_a_body(s3: S3Server, proxy: FaultProxy, put: Put) -> None:
    where = put("key", BODY)
    proxy.faults = Faults(stall=1)
    body = plain(s3, proxy, read_timeout=1).get_object(**where)["Body"]
    received, begin = b"", time.monotonic()
    with pytest.raises(ReadTimeoutError):
        while piece := body.read(1000):
            received += piece
    assert 0.9 < time.monotonic() - begin < 3
    assert len(received) == proxy.counts["bytes"] // 1000 * 1000 < len(BODY)
    assert received == BODY[: len(received)]
    assert proxy.counts["stall"] == 1


def test_refuses_connections(client: Any, proxy: FaultProxy, put: Put) -> None:
    where = put("key", BODY)
    proxy.faults = Faults(refuse=1)
    with pytest.raises((ConnectionClosedError, EndpointConnectionError)):  # RST after, or while, it connects
        client.head_object(**where)
    assert proxy.counts["refuse"] == 1
    assert proxy.counts["requests"] == 0
    proxy.faults = Faults()
    assert client.head_object(**where)["ContentLength"] == len(BODY)


def test_is_down_and_comes_back(client: Any, proxy: FaultProxy, put: Put) -> None:
    where = put("key", BODY)
    body = client.get_object(**where)["Body"]
    body.read(1)
    proxy.faults = Faults(refusing=True)
    with pytest.raises(ResponseStreamingError):
        body.read()
    for _ in range(2):
        with pytest.raises(EndpointConnectionError):
            client.head_object(**where)
    proxy.faults = Faults()
    assert client.get_object(**where)["Body"].read() == BODY


def test_answers_with_errors(client: Any, proxy: FaultProxy, put: Put) -> None:
    where = put("key", BODY)
    proxy.faults = Faults(errors=1)
    codes = {"SlowDown": 503, "InternalError": 500}
    seen = set()
    for count in range(1, 9):
        with pytest.raises(ClientError) as caught:
            if count % 2:
                client.get_object(**where)
            else:
                client.put_object(Bucket=where["Bucket"], Key="new", Body=BODY)
        code = caught.value.response["Error"]["Code"]
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == codes[code]
        assert proxy.counts["error"] == proxy.counts["requests"] == count
        seen.add(code)
    assert seen == set(codes)
    with pytest.raises(ClientError, match="50[03]"):
        client.head_object(**where)
    proxy.faults = Faults()
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=where["Bucket"])["Contents"]] == ["key"]


def test_inverts_one_byte(client: Any, proxy: FaultProxy, put: Put) -> None:
    where, small = put("key", BODY), put("small", BODY[:999])
    proxy.faults = Faults(flip=1)
    received = client.get_object(**where)["Body"].read()
    assert [a ^ b for a, b in zip(received, BODY, strict=True) if a != b] == [0xFF]
    assert client.get_object(**small)["Body"].read() == BODY[:999]
    assert proxy.counts["flip"] == 1

    proxy.faults = Faults(flip_always="/small", only="nothing")
    for _ in range(3):
        received = client.get_object(**small)["Body"].read()
        assert sum(a != b for a, b in zip(received, BODY[:999], strict=True)) == 1
    assert client.get_object(**where)["Body"].read() == BODY
    assert proxy.counts["flip"] == 4


def test_is_slow(client: Any, proxy: FaultProxy, put: Put) -> None:
    where = put("key", BODY)
    proxy.faults = Faults(latency=0.1, rate=20_000_000)
    begin = time.monotonic()
    body = client.get_object(**where)["Body"]
    assert 0.1 <= time.monotonic() - begin < 1
    assert body.read() == BODY
    assert 0.25 <= time.monotonic() - begin < 2


def test_disturbs_only_what_it_is_told_to(client: Any, proxy: FaultProxy, put: Put) -> None:
    good, bad = put("good key", BODY), put("bad key", BODY)
    proxy.faults = Faults(errors=1, only="/bad key")
    assert client.get_object(**good)["Body"].read() == BODY
    with pytest.raises(ClientError):
        client.get_object(**bad)
    assert (proxy.counts["requests"], proxy.counts["error"]) == (2, 1)


def test_a_seed_repeats_itself(s3: S3Server, put: Put) -> None:
    where = put("key", BODY[:2000])

    def story(seed: int) -> list[bytes | str]:
        told: list[bytes | str] = []
        with FaultProxy("127.0.0.1", s3.port, seed=seed) as proxy:
            client = plain(s3, proxy)
            proxy.faults = Faults(errors=0.3, flip=0.5, reset_every=(1000, 9000))
            for _ in range(20):
                try:
                    told.append(client.get_object(**where)["Body"].read())
                except (ClientError, ResponseStreamingError) as error:
                    told.append(type(error).__name__)
        assert told.count("ResponseStreamingError") == proxy.counts["reset"] > 0
        assert told.count("ClientError") == proxy.counts["error"] > 0
        return told

    assert story(1) == story(1) != story(2)
