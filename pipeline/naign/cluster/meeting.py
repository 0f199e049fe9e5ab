"""All hosts of a job wait for each other before any of them starts its ranks.

A terminating pod of an earlier start has the name and index of one that is awaited, so every host names its start, and
host 0 rejects others (admission.py). Hosts then use the address of host 0: its name may soon resolve to another pod.

Hosts of a start meet again when one was lost and replaced. Meetings are numbered by generation: one more than the
largest that any host has seen. Of two hosts with one index the later one stays, unless its generation is older; the
other one must leave, so that they do not take turns. Connections stay open while the ranks run: those of a host that
dies are closed, so the others learn at once what a collective may not report for minutes.
"""

import contextlib
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil

from naign.cluster.admission import Answer, Guests, Hello, notice_death
from naign.cluster.exit_codes import say
from naign.cluster.place import Place
from naign.errors import InputError, PeerLost, printable

EVERY = 10.0  # seconds between two messages about the missing hosts
TELLING = 30.0  # seconds for which host 0 stays to tell hosts that start later why it ends


def meet(place: Place, listener: socket.socket | None, *, port: int, within: float) -> "Links":
    """Wait `within` seconds until every host of this start is connected; `listener` is what `listen` opened on host 0.

    Raises PeerLost when time is up or another host has this index, InputError if hosts count each other differently.
    """
    if place.hosts == 1:
        return Links("127.0.0.1", {}, 1, 1)
    check = _time_limit(within)
    return _wait_for_others(place, listener, check) if listener else _go_to_first(place, port, check)


def listen(port: int, option: str = "--meeting-port", host: int = 0) -> socket.socket:
    """A listening socket of `host`, on the port that `option` names; InputError if it is in use."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        problem = f"port {port} cannot be opened on host {host} ({error.strerror})"
        raise InputError(f"{problem}: choose another {option}") from None


def reject_all(listener: socket.socket, place: Place, error: InputError, within: float = TELLING) -> None:
    """Tell the other hosts why all end as they connect, for `within` seconds or until all of them know."""
    until = time.monotonic() + within
    with contextlib.closing(Guests(place, listener, ending=f"host 0: {error}"[:400])) as guests:
        while len(guests.informed) < place.hosts - 1 and (left := until - time.monotonic()) > 0:
            guests.serve(min(left, 1))


class Links:
    """Open connections by host index: of host 0 to all others, of any other host to host 0."""

    def __init__(self, address: str, peers: dict[int, socket.socket], generation: int, since: int) -> None:
        self.address = address  # of host 0
        self.generation, self.since = generation, since  # see Place
        self._peers = peers

    def interface(self) -> str:
        """The network interface by which this host reaches the others; '' if unknown."""
        mine = _plain(next(iter(self._peers.values())).getsockname())
        for name, addresses in psutil.net_if_addrs().items():
            if mine in [entry.address.partition("%")[0] for entry in addresses]:
                return name
        return ""

    def watch(self, ended: Callable[[int, int | None, bool], None]) -> None:
        """Call `ended(host, code, lost)` from a thread when a host ends: what its `leave` sent, or None and False."""

        def listen(host: int, peer: socket.socket) -> None:
            received = b""
            peer.setblocking(True)
            with contextlib.suppress(OSError):
                while part := peer.recv(64):
                    received += part
            match = re.fullmatch(rb"(\d{1,9})( lost)?\n", received)
            ended(host, int(match[1]) if match else None, bool(match and match[2]))

        for host, peer in self._peers.items():
            threading.Thread(target=listen, args=(host, peer), name=f"host {host}", daemon=True).start()

    def leave(self, code: int, *, lost: bool = False) -> None:
        """Send the others this host's exit code, and whether it knows of a host that was lost."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"{code}{' lost' * lost}\n".encode())
                peer.shutdown(socket.SHUT_WR)


def _time_limit(within: float) -> Callable[[str], None]:
    """What to call often with who is awaited: it logs that every EVERY seconds, and PeerLost ends it after `within`."""
    begun = logged = time.monotonic()

    def check(for_whom: str) -> None:
        nonlocal logged
        now = time.monotonic()
        if now > begun + within:
            remedy = "start all again and they go on from the newest checkpoint"
            raise PeerLost(f"waited {within:.0f} s for {for_whom}, which is not there: {remedy}")
        if now >= logged + EVERY:
            logged = now
            say(f"waiting for {for_whom} ({now - begun:.0f} s)")

    return check


def _wait_for_others(place: Place, listener: socket.socket, check: Callable[[str], None]) -> Links:
    with contextlib.closing(Guests(place, listener)) as guests:
        while len(guests.hosts) < place.hosts - 1:
            missing = [index for index in range(1, place.hosts) if index not in guests.hosts]
            shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            check(f"host {shown} of {place.hosts}")
            guests.serve(seconds=1)
        peers = {index: peer for index, (peer, _) in guests.hosts.items()}
        generation = guests.newest + 1
        same = place.generation == guests.newest and all(hello.generation for _, hello in guests.hosts.values())
        answer = Answer(go=True, generation=generation, since=place.since if same else generation)
        for peer in peers.values():
            with contextlib.suppress(OSError):  # a host that is gone is missed later, and all meet again
                peer.setblocking(True)
                peer.sendall(answer.line())
        return Links(_plain(next(iter(peers.values())).getsockname()), peers, generation, answer.since)


def _go_to_first(place: Place, port: int, check: Callable[[str], None]) -> Links:
    hello = Hello(place.start, place.index, place.hosts, place.generation, uuid.uuid4().hex)
    head, reason = f"{place.head}, port {port}", ""
    while True:
        check(f"host 0 ({head}){reason}")
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(_connect(place.head, port))
                notice_death(connection)
                connection.sendall(hello.line())
                answer = _answer(connection, lambda: check(f"an answer of {head}, where a program listens"))
                if answer.go:
                    stack.pop_all()
                    return Links(_plain(connection.getpeername()), {0: connection}, answer.generation, answer.since)
            except socket.gaierror as error:
                answer = Answer(no=f"no address of that name ({error.strerror})")
            except OSError:
                answer = Answer()
            except ValueError:
                answer = Answer(no="another program answers there")
            refusal = printable(answer.no)
            if answer.end:
                raise InputError(refusal or "host 0 rejected this one")
            if answer.leave:
                raise PeerLost(refusal or "host 0 has another host in this one's place")
            reason = f": {refusal}" if refusal else ""
        time.sleep(0.5)


def _plain(address: Any) -> str:
    """The address of a socket, an IPv4 one not written as IPv6."""
    return str(address[0]).removeprefix("::ffff:")


def _connect(name: str, port: int) -> socket.socket:
    """Connect to one of a name's addresses, in random order, since one may be that of a pod of an earlier start."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
    for address in random.sample(addresses, len(addresses)):
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=5)
    raise OSError(f"no address of {name} answers")


def _answer(connection: socket.socket, check: Callable[[], None]) -> Answer:
    """Host 0's answer. It is read byte by byte: what follows is for `Links.watch`. OSError if the connection closes."""
    connection.settimeout(1)
    line = b""
    while not line.endswith(b"\n"):
        check()
        with contextlib.suppress(TimeoutError):
            byte = connection.recv(1)
            if not byte:
                raise ConnectionAbortedError
            line += byte
        if len(line) > 4096:
            raise ValueError("too long for an answer")
    answer = Answer.read(line)
    if answer.go and not 0 < answer.since <= answer.generation:
        raise ValueError("a generation before its first")
    return answer
