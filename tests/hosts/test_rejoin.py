"""Hosts that meet again after one was lost: which generation it is, who is taken in, who stays, and who leaves."""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from naign.cluster import rejoin
from naign.cluster.admission import Hello
from naign.cluster.exit_codes import Ending
from naign.cluster.meeting import Links, listen, meet
from naign.cluster.place import Place
from naign.cluster.rejoin import LIMIT, check_progress, meet_again
from naign.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST, PeerLost, Unavailable
from tests.conftest import SMALL, environment
from tests.servers import free_port


def host(index: int, generation: int, since: int = 0, hosts: int = 3) -> Place:
    named = {"head": "localhost", "start": "a", "generation": generation, "since": since}
    return Place(orchestrator="test", index=index, hosts=hosts, **named)  # type: ignore[arg-type]


def together(*places: Place, port: int, within: float = 20) -> list[Any]:
    """What `meet` gives each, or raises."""
    found: list[Any] = [None] * len(places)

    def come(number: int) -> None:
        with contextlib.nullcontext() if number else listen(port) as listener:
            try:
                found[number] = meet(places[number], listener, port=port, within=within)
            except PeerLost as error:
                found[number] = error

    threads = [threading.Thread(target=come, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within + 10)
    return found


@pytest.mark.parametrize(
    ("past", "met"),
    [
        (((0, 0), (0, 0), (0, 0)), (1, 1)),  # at first
        (((4, 2), (4, 2), (4, 2)), (5, 2)),  # none was replaced
        (((4, 2), (0, 0), (4, 2)), (5, 5)),
        (((0, 0), (4, 2), (3, 2)), (5, 5)),  # host 0 was lost before it had told all that they had met
    ],
)
def test_each_meeting_is_one_more_than_any_host_has_seen(past, met):
    found = together(*(host(index, *seen) for index, seen in enumerate(past)), port=free_port())
    assert [(links.generation, links.since) for links in found] == [met] * 3


def greet(port: int, hello: Hello) -> socket.socket:
    """Connect to host 0, once it listens, and say so."""
    deadline = time.monotonic() + 10
    while True:
        try:
            guest = socket.create_connection(("localhost", port))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    guest.sendall(hello.line())
    guest.settimeout(10)
    return guest


def test_of_two_pods_with_one_index_the_later_goes_on_unless_it_is_of_an_older_generation(capsys):
    port, first = free_port(), host(0, 5)
    listener = listen(port)
    hello = Hello("a", 1, 3, 0, "earlier")
    meeting = threading.Thread(target=lambda: found.append(meet(first, listener, port=0, within=20)))
    found: list[Links] = []
    meeting.start()
    with greet(port, hello) as earlier, greet(port, dataclasses.replace(hello, member="later")) as later:
        assert b'"leave": true' in earlier.recv(1000)
        with greet(port, dataclasses.replace(hello, member="old", generation=3)) as old:
            told = old.recv(1000)
            assert b"a host 1 of generation 3, which came after generation 5, was rejected" in told
            assert b'"leave": true' in told
        with greet(port, Hello("a", 2, 3, 5, "survivor")) as survivor:
            assert b'"go": true, "generation": 6' in later.recv(1000)
            assert b'"go": true, "generation": 6' in survivor.recv(1000)
    meeting.join(10)
    listener.close()
    assert found[0].generation == 6
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "host 1 came again, as another pod",
        "a host 1 of generation 3, which came after generation 5, was rejected",
    ]


def test_a_host_whose_place_is_taken_leaves_and_so_does_an_old_host_0():
    with socket.create_server(("localhost", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b'{"no": "taken", "leave": true}\n'))
        thread.start()
        with pytest.raises(PeerLost, match="^taken$"):
            meet(host(1, 3), None, port=server.getsockname()[1], within=10)
        thread.join(10)
    old, _ = together(host(0, 3, hosts=2), host(1, 5, hosts=2), port=free_port(), within=2)
    assert "host 1 comes from generation 5, this host 0 from an older one (3)" in str(old)


def test_starts_that_end_early_with_the_same_hosts_are_not_tried_for_ever():
    check_progress(Links("", {}, 7, 8 - LIMIT))
    with pytest.raises(Unavailable, match="no host was lost"):
        check_progress(Links("", {}, 7, 7 - LIMIT))


@pytest.mark.parametrize(
    ("code", "what", "stays"),
    [
        (PEER_LOST, {}, True),
        (INTERRUPTED, {}, True),  # another host was asked to stop
        (INTERRUPTED, {"stopping": True}, False),
        (PEER_LOST, {"asked": True}, False),
        *((code, {}, False) for code in (0, BAD_INPUT, FAILED, 137)),
    ],
)
def test_who_stays_and_who_leaves(code, what, stays):
    ending = Ending(patience=60)
    for name, value in what.items():
        setattr(ending, name, value)
    assert ending.may_go_on(code) == stays
    assert not Ending(patience=60, alone=True).may_go_on(code)


def test_a_host_whose_rank_was_killed_says_so_at_once(monkeypatch):
    ending = Ending(patience=60)
    ending.killed = True
    monkeypatch.setattr(ending, "wait_for", lambda *_: pytest.fail("it waits"))
    assert ending.judge(FAILED) == FAILED


def test_a_host_that_is_asked_to_end_while_its_ranks_are_killed_does_not_meet_again(monkeypatch):
    """Other threads than the one that executes it anew still take signals."""
    ending = Ending(patience=60)

    def asked(*_, **__):
        ending.asked = True
        return [], []

    monkeypatch.setattr(rejoin, "kill_children", list)  # this process has servers of other tests
    monkeypatch.setattr(rejoin.psutil, "wait_procs", asked)
    monkeypatch.setattr(rejoin.os, "execve", lambda *_: pytest.fail("it goes on"))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert meet_again({}, PEER_LOST, ending, Links("", {}, 1, 1), 0.0) == PEER_LOST
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def until(condition: Any, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_keeps_its_process_when_another_is_lost_and_heeds_a_signal_meanwhile(digits, tmp_path):
    ports = (f"--port={free_port()}", f"--meeting-port={free_port()}")
    options = (
        *ports,
        f"--data.path={digits}",
        *SMALL,
        "--train.images=307200",
        "--run.path=run",
        "--checkpoint.rounds=2",
    )
    logs, metrics = [tmp_path / "0.log", tmp_path / "1.log"], tmp_path / "run/metrics.jsonl"

    def start(index: int) -> psutil.Popen:
        named = environment(NAIGN_HOSTS="2", NAIGN_HEAD="localhost", JOB_COMPLETION_INDEX=str(index), NAIGN_START="s")
        with logs[index].open("a") as log:
            command = [sys.executable, "-m", "naign.cli", "launch", *options]
            return psutil.Popen(command, cwd=tmp_path, env=named, stderr=log, stdout=log)

    def staying() -> int:
        return logs[0].read_text().count("this host stays")

    def rounds() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    first, second = start(0), start(1)
    try:
        until(lambda: rounds() > 3, logs[0])
        (rank,) = second.children()
        rank.kill()
        assert second.wait(60) == FAILED and "SIGKILL: out of memory?" in logs[1].read_text().splitlines()[-1]
        until(lambda: staying() == 1, logs[0])
        second = start(1)
        until(lambda: "resuming from" in logs[0].read_text(), logs[0])
        before = rounds()
        until(lambda: rounds() > before, logs[0])
        second.kill()
        until(lambda: staying() == 2, logs[0])
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == INTERRUPTED, logs[0].read_text()
        assert "stopped on request" in logs[0].read_text().splitlines()[-1]
    finally:
        for process in (first, second):
            if process.is_running():
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
