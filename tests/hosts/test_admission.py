"""Numbers in greetings and answers, and greetings that come slowly or not at all."""

import dataclasses
import json
import socket
import threading
import time
from typing import Any

import pytest

from naign.cluster.admission import Answer, Guests, Hello
from naign.cluster.meeting import meet, reject_all
from naign.cluster.place import MOST, Place
from naign.errors import InputError, PeerLost

HELLO = Hello("a", 1, 3, 0, "m")


def place(index: int, hosts: int, generation: int = 0) -> Place:
    return Place(orchestrator="test", index=index, hosts=hosts, head="localhost", start="a", generation=generation)


@pytest.mark.parametrize(
    "met",
    ["Infinity, 'since': 0", "-7, 'since': -7", f"{10**300}, 'since': 0", "100000, 'since': 0", "1, 'since': 2"]
    + ["1.5, 'since': 0", "true, 'since': 0", "'3', 'since': 0", "1"],
)
def test_an_answer_with_a_number_that_cannot_be_is_another_programs(met):
    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"{{'go': true, 'generation': {met}}}\n".replace("'", '"').encode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(PeerLost, match="another program answers there"):
            meet(place(1, 2), None, port=server.getsockname()[1], within=0.4)
        thread.join(10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index", int("9" * 3000)),
        ("index", -1),
        ("index", 10**5),
        ("hosts", 10**5),
        ("generation", MOST + 1),
        ("generation", True),
        ("generation", "3"),
        ("start", ["a"]),
        ("more", 1),
    ],
)
def test_a_greeting_with_a_number_that_cannot_be_is_a_strangers(name, value):
    assert Hello.read(HELLO.line()) == HELLO
    with pytest.raises(ValueError, match=r"out of bounds|other fields|digits"):
        Hello.read(json.dumps(dataclasses.asdict(HELLO) | {name: value}).encode())


def test_there_is_no_meeting_after_the_last_generation():
    with socket.create_server(("127.0.0.1", 0)) as server:
        guests = Guests(place(0, 3), server)
        with socket.create_connection(server.getsockname()[:2], timeout=10) as guest:
            guest.sendall(dataclasses.replace(HELLO, generation=MOST).line())
            for _ in range(2):  # it connects, it speaks
                guests.serve(1)
            assert b"calls itself host 1 was rejected" in guest.recv(1000)
        guests.close()


def test_the_newest_generation_is_remembered_when_its_host_had_to_leave():
    met: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        meeting = threading.Thread(target=lambda: met.append(meet(place(0, 3), server, port=0, within=20)))
        meeting.start()

        def greet(**what: Any) -> socket.socket:
            guest = socket.create_connection(("127.0.0.1", port), timeout=10)
            guest.sendall(dataclasses.replace(HELLO, **what).line())
            return guest

        with greet(generation=3, member="x") as first, greet(member="y") as new:
            assert b'"leave": true' in first.recv(1000)
            with greet(generation=2, member="z") as stale:
                assert b"of generation 2, which came after generation 3" in stale.recv(1000)
            with greet(index=2, member="w"):
                assert b'"go": true, "generation": 4, "since": 4' in new.recv(1000)
        meeting.join(10)
    assert met[0].generation == 4


def test_silent_strangers_and_slow_greetings_do_not_keep_hosts_from_the_reason():
    line, begun = HELLO.line(), time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        guests = [socket.create_connection(server.getsockname()[:2], timeout=10) for _ in range(42)]
        ending = threading.Thread(target=reject_all, args=(server, place(0, 3), InputError("no GPUs"), 10))
        guests[40].sendall(line[:9])
        ending.start()
        guests[41].sendall(dataclasses.replace(HELLO, index=2).line())
        assert Answer.read(guests[41].recv(1000)) == Answer(no="host 0: no GPUs", end=True)
        guests[40].sendall(line[9:])
        assert Answer.read(guests[40].recv(1000)) == Answer(no="host 0: no GPUs", end=True)
        ending.join(10)
        assert time.monotonic() - begun < 5
        begun = time.monotonic()
        reject_all(server, place(0, 3), InputError("no GPUs"), 0.2)
        assert time.monotonic() - begun < 2
        for guest in guests:
            guest.close()


def test_who_ends_takes_nobody_in():
    with socket.create_server(("127.0.0.1", 0)) as server:
        guests = Guests(place(0, 3), server, ending="no GPUs")
        with socket.create_connection(server.getsockname()[:2], timeout=10) as guest:
            guest.sendall(dataclasses.replace(HELLO, hosts=4).line())  # which ends a meeting
            while not guests.informed:
                guests.serve(1)
            assert b"counts 4 hosts" in guest.recv(1000) and not guests.hosts
        guests.close()
