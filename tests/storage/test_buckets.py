"""What buckets of all kinds do alike: SeaweedFS for s3://, and the same behind a proxy for gs://."""

import os
import random
import re

import pytest

from naign.data.format.audit import verify
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.errors import InputError, Unavailable
from naign.storage.others import OtherStore
from naign.storage.store import open_store
from tests.data.numbered import numbered
from tests.programs import succeeded
from tests.proxy import FaultProxy, Faults

MIB = 1 << 20
DATA = random.Random(0).randbytes(12 * MIB + 12_345)


@pytest.fixture
def store(place):
    return open_store(f"{place}/some/where")


def test_there_and_back(store, place):
    assert store.list() == store.folders() == []
    for name, data in {
        "b": b"12345",
        "a": b"1",
        "ä b+c%20?#.tar": b"odd",
        "empty": b"",
    }.items():
        store.put(name, data)
    store.put("a", b"123")
    names = ["a", "b", "empty", "ä b+c%20?#.tar"]
    assert store.list() == names
    assert store.size("a") == 3
    assert store.read("b") == b"12345"
    assert store.read("ä b+c%20?#.tar") == b"odd"
    assert store.read("b", 1, 3) == b"23"
    assert store.read("empty") == b"".join(store.pieces("empty")) == b""
    assert store.url("a") == f"{place}/some/where/a"
    open_store(f"{place}/some").put("beside", b"")
    open_store(f"{place}/some/where/deeper").put("below", b"")
    assert store.list() == names
    assert store.folders() == ["deeper"]
    assert open_store(f"{place}/some/where/").list() == names
    assert open_store(place).folders() == ["some"]
    store.delete("a")
    store.delete("a")
    assert store.exists("b")
    for name in ("a", "deeper", "b/c"):
        assert not store.exists(name)
    with pytest.raises(InputError, match=f"{place}/some/where/a: no such object"):
        store.read("a")
    with pytest.raises(InputError, match="5 bytes where 9 were expected: truncated"):
        store.read("b", 0, 9)


def test_files_are_sent_in_parts(store, tmp_path, monkeypatch):
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 60.0)  # a server that makes room for them takes seconds
    store.put("a", DATA)
    assert store.read("a") == b"".join(store.pieces("a")) == DATA
    (tmp_path / "c").write_bytes(DATA)
    store.put_file("c", tmp_path / "c")
    assert store.list() == ["a", "c"]
    assert store.read("c") == DATA


@pytest.mark.parametrize("again", [b"9" * len(DATA), b"short", None], ids=["same size", "shorter", "deleted"])
def test_an_object_that_changes_while_it_is_read(store, monkeypatch, again):
    monkeypatch.setattr("naign.storage.network.RANGE", 100_000)
    store.put("a", DATA)
    known = open_store(store.path)
    assert known.size("a") == len(DATA)
    pieces = store.pieces("a")
    assert next(pieces) == DATA[:100_000]
    other = open_store(store.path)
    if again is None:
        other.delete("a")
        message = "where/a: no such object"
    else:
        other.put("a", again)
        message = "where/a: replaced while it was being read: verify the data set"
    with pytest.raises(InputError, match=message):
        b"".join(pieces)
    with pytest.raises(InputError, match=message):
        known.read("a", 50, 60)


def test_no_such_bucket(place):
    store = open_store(f"{place}-none/there")
    said = "(there is no bucket|no such object)"
    if place.startswith("s3:"):
        said = "there is no bucket .*-none: make it first, or check the path, AWS_ENDPOINT_URL"
    for ask in (lambda: store.put("a", b""), lambda: store.put("a", DATA)):
        with pytest.raises(InputError, match=f"{place}-none/there/a: {said}"):
            ask()
    with pytest.raises(InputError, match=f"{place}-none/there/: there is no bucket"):
        store.list()
    assert not store.exists("a")


def test_a_data_set_is_packed_verified_and_read(place, packed):
    pack(numbered(), f"{place}/set", shards=4)
    assert verify(f"{place}/set")[0] == 28
    assert read_split(f"{place}/set", "train")[0].equal(read_split(packed, "train")[0])


def test_google_through_faults(google, monkeypatch):
    store = open_store(google)
    port = int(os.environ["GOOGLE_BASE_URL"].rpartition(":")[2])
    with FaultProxy("127.0.0.1", port) as proxy:
        monkeypatch.setenv("GOOGLE_BASE_URL", proxy.endpoint)
        OtherStore.forget_client()
        proxy.faults = Faults(errors=0.3, refuse=0.1, reset_every=(MIB, 4 * MIB))
        for _ in range(3):
            store.put("a", DATA)
            assert store.read("a") == DATA
        assert store.tally.retries > 3
        assert proxy.counts["reset"]
        assert proxy.counts["error"]
        proxy.faults = Faults(refusing=True)
        monkeypatch.setattr("naign.storage.retry.PATIENCE", 0.3)
        for ask in (store.list, lambda: store.size("a"), lambda: store.put("a", DATA)):
            with pytest.raises(Unavailable, match="gs://.*: given up after . s; the last .* failed with .*HTTP error"):
                ask()
        monkeypatch.setenv("GOOGLE_BASE_URL", proxy.endpoint.replace("http:", "https:"))
        proxy.faults = Faults()
        OtherStore.forget_client()
        with pytest.raises(InputError, match="InvalidContentType"):
            store.list()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://", "no bucket: write gs://bucket/prefix"),
        ("az:c/data", "az:c/data: write az://bucket/prefix"),
        ("gs://me:secret@example.org/data", "gs://: the address holds a user"),
        ("abfs://c:secret@acc.dfs.core.windows.net/data", "abfs://: the address has a user, password"),
        ("http://127.0.0.1:99999/data", "http://: the address has a user, password or query, or no plain name or port"),
        ("gs://a bucket/data", "gs://: the address has a user, password or query, or no plain name"),
    ],
)
def test_addresses_that_lead_nowhere(path, message):
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        open_store(path)
    assert "secret" not in str(refused.value)


def test_credentials_of_a_machine_that_has_none(tmp_path, monkeypatch):
    (tmp_path / "account").write_text('{"type": "external_account"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account"))
    with pytest.raises(InputError, match="gs://bucket/: .*unknown variant `external_account`"):
        open_store("gs://bucket").list()
    assert open_store("abfs://c@acc.dfs.core.windows.net/x").url("a") == "abfs://c@acc.dfs.core.windows.net/x/a"


@pytest.mark.slow
def test_a_run_is_mirrored_and_resumed_from_there(
    google,
    small,
    train,
    naign,
):
    options = [*small, f"--run.remote={google}/run", "--resume=changed"]
    for run, images in (("one", 256), ("two", 512)):
        done = succeeded(train(*options, f"--run.path={run}", f"--train.images={images}"))
    assert "goes on with another train.images: 256 there" in done.stderr
    assert len(open_store(f"{google}/run/checkpoints").folders()) == 2
    assert "metrics.jsonl" in open_store(f"{google}/run").list()
    succeeded(naign(f"sample {google}/run --n 4 --to samples.png"))
