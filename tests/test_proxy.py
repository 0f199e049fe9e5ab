"""What tests/proxy.py passes on and damages, as a plain boto3 client meets it; tests/storage has its other faults."""

import random

import pytest
from botocore.exceptions import ClientError, ResponseStreamingError

from tests.proxy import FaultProxy, Faults

BODY = random.Random(0).randbytes(3_000_000)


def plain(s3, proxy):
    """A client that talks to the proxy, never tries twice and checks no body itself."""
    return s3.client(
        endpoint=proxy.endpoint,
        retries={"total_max_attempts": 1},
        response_checksum_validation="when_required",
    )


@pytest.fixture
def client(s3, proxy):
    return plain(s3, proxy)


@pytest.fixture
def put(s3, bucket):
    """Stores an object beside the proxy."""

    def put(key, body):
        where = {"Bucket": bucket.removeprefix("s3://"), "Key": key}
        s3.client().put_object(**where, Body=body)
        return where

    return put


def read(client, where, **more):
    return client.get_object(**where, **more)["Body"].read()


def differences(received, body):
    """The bits that differ, of each byte that does."""
    assert len(received) == len(body)
    found = int.from_bytes(received) ^ int.from_bytes(body)
    return [bits for bits in found.to_bytes(len(body)) if bits]


def test_passes_everything_on(client, proxy, put):
    where = put("whole", BODY)
    assert read(client, where) == BODY
    assert read(client, where, Range="bytes=1000-2000999") == BODY[1000:2_001_000]
    assert client.head_object(**where)["ContentLength"] == len(BODY)
    missing = {**where, "Key": "missing"}
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(**missing)
    with pytest.raises(ClientError, match="404"):
        client.head_object(**missing)
    client.put_object(**missing, Body=BODY)
    assert read(client, missing) == BODY
    client.delete_object(**where)
    client.delete_object(**missing)
    assert client.list_objects_v2(Bucket=where["Bucket"])["KeyCount"] == 0
    methods = [method for method, path in proxy.requests if where["Bucket"] in path]
    assert " ".join(methods) == "GET GET HEAD GET HEAD PUT GET DELETE DELETE GET"
    assert proxy.counts["requests"] == len(proxy.requests)
    assert proxy.counts["bytes"] >= 2 * len(BODY) + 2_000_000
    assert set(proxy.counts) == {"requests", "bytes"}


def test_inverts_one_byte(client, proxy, put):
    where = put("key", BODY)
    small = put("small", BODY[:999])
    proxy.faults = Faults(flip=1)
    assert differences(read(client, where), BODY) == [0xFF]
    assert read(client, small) == BODY[:999]
    assert proxy.counts["flip"] == 1

    proxy.faults = Faults(flip_always="/small", only="nothing")
    for _ in range(3):
        assert differences(read(client, small), BODY[:999]) == [0xFF]
    assert read(client, where) == BODY
    assert proxy.counts["flip"] == 4


def test_a_seed_repeats_itself(s3, put):
    where = put("key", BODY[:2000])

    def story(seed):
        told = []
        with FaultProxy("127.0.0.1", s3.port, seed=seed) as proxy:
            client = plain(s3, proxy)
            proxy.faults = Faults(errors=0.3, flip=0.5, reset_every=(1000, 9000))
            for _ in range(20):
                try:
                    told.append(read(client, where))
                except (ClientError, ResponseStreamingError) as error:
                    told.append(type(error).__name__)
        assert told.count("ResponseStreamingError") == proxy.counts["reset"] > 0
        assert told.count("ClientError") == proxy.counts["error"] > 0
        return told

    once = story(1)
    assert once == story(1)
    assert once != story(2)
