"""How long a store is waited for: a time since the first failure that all ranks share, whatever their number."""

import time
from types import SimpleNamespace

import pytest

from naign.errors import FAILED, PEER_LOST, InputError, StoreLost, Unavailable
from naign.storage.prefetch import in_order
from naign.storage.retry import Patience, Tally, give_up_after
from naign.storage.s3_client import forget_clients
from naign.storage.store import open_store, was_there
from tests.proxy import Faults


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only while somebody sleeps; waits are those of a real run."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr("naign.storage.retry.PATIENCE", 300)
    monkeypatch.setattr("naign.storage.retry.FIRST_PATIENCE", 30)
    monkeypatch.setattr("naign.storage.retry.FIRST_PAUSE", 0.2)
    monkeypatch.setattr("naign.storage.retry.LONGEST_PAUSE", 10)
    monkeypatch.setattr("naign.storage.retry.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    yield now


def give_up(patience, *, known=True):
    """What is raised after failures without end."""
    with pytest.raises(Unavailable) as caught:
        while True:
            patience.wait("503", known=known)
    return caught.value


def test_no_request_of_many_ranks_gives_up_before_the_others(clock):
    for _ in range(1024):
        clock[0] = 0.0
        error = give_up(Patience("read a", Tally()))
        assert clock[0] == pytest.approx(300)
    assert str(error).startswith("read a: given up after 300 s; the last attempt failed with 503. Check the network")


def test_progress_starts_the_time_anew(clock):
    patience = Patience("read a", Tally())
    for _ in range(10):
        patience.wait("reset", progress=True)
        clock[0] += 200
    give_up(patience)
    assert clock[0] > 2000


def test_a_store_that_has_answered_is_a_loss_that_is_not_counted(clock):
    assert give_up(Patience("read a", Tally())).code == PEER_LOST
    clock[0] = 0.0
    assert give_up(Patience("read a", Tally()), known=False).code == FAILED
    assert clock[0] == pytest.approx(30)  # the address may be wrong: the user hears of it soon


def test_who_can_do_without_the_answer_waits_less_for_it_in_its_threads_too(clock):
    def ask():
        give_up(Patience("read a", Tally()))

    with give_up_after(3):
        for _ in in_order([ask, ask]):
            assert clock[0] < 7
    with give_up_after(0):
        assert give_up(Patience("read a", Tally()))
        assert clock[0] < 7


def test_a_server_that_throttles_from_the_first_request_is_a_loss(bucket, proxy, hasty):
    proxy.faults = Faults(errors=1.0)
    with pytest.raises(StoreLost, match="given up after .* failed with (SlowDown|InternalError|50)"):
        open_store(f"{bucket}/a").list()


def deny(monkeypatch):
    """From now on the credentials are wrong."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()


@pytest.mark.parametrize("action", ["read", "list"])
def test_access_that_is_denied_after_good_reads_is_neither_lost_data_nor_bad_input(store, monkeypatch, action):
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 0.3)
    store.put("a", b"12345")
    ask = {"read": lambda: store.read("a", 0, 2), "list": store.list}[action]
    ask()
    deny(monkeypatch)
    with was_there(store.url("a")), pytest.raises(StoreLost, match="given up after .* failed with"):
        ask()


def test_credentials_that_are_renewed_in_time_go_on(store, s3, monkeypatch):
    store.put("a", b"12345")
    store.list()
    deny(monkeypatch)

    def renew(seconds):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.environment["AWS_SECRET_ACCESS_KEY"])
        time.sleep(seconds)

    monkeypatch.setattr("naign.storage.retry.time", SimpleNamespace(monotonic=time.monotonic, sleep=renew))
    assert store.list() == ["a"]


def test_access_that_was_never_granted_is_bad_input_unless_this_is_a_restart(bucket, monkeypatch):
    monkeypatch.setattr("naign.storage.retry.PATIENCE", 0.3)
    deny(monkeypatch)
    with pytest.raises(InputError, match="access denied"):
        open_store(bucket).list()
    monkeypatch.setenv("NAIGN_GENERATION", "2")
    with pytest.raises(StoreLost):
        open_store(bucket).list()
