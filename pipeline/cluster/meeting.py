"""All hosts of a job wait for each other before any of them starts its ranks.

A launcher's rendezvous admits whoever connects, and a pod of an earlier start of the same job that still terminates has
the name and index of one that is awaited. So every host names its start, and host 0 rejects those of other starts.
Hosts then use the address at which host 0 answered, since its name may resolve to another pod a moment later.

Hosts of a start meet again when one was lost (rejoin.py); admission.py decides who is admitted. Meetings are numbered
by generation: one more than the largest that any host has seen. Of two hosts with one index the later one stays, unless
its generation is older; the other one must leave, so that they do not take turns.

The connections stay open while the ranks run. A host that dies closes its connections, so the others learn at once what
a collective may not report for minutes.
"""

import contextlib
import json
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

import psutil

from pipeline.cluster.admission import Disagreement, Guests, Hello, Met, notice_death
from pipeline.cluster.place import MOST, Place
from pipeline.errors import InputError, PeerLost, printable

EVERY = 10.0  # seconds between two messages about the missing hosts
TELLING = 30.0  # seconds for which host 0 stays to tell hosts that start later why it ends


def meet(
    place: Place,
    *,
    port: int,
    within: float = 900,  # seconds
    say: Callable[[str], None] = print,
    listener: socket.socket | None = None,
) -> "Links":
    """Wait until every host of this start is connected; `listener` is what `listen` opened on host 0, if called.

    Raises PeerLost when time is up or another host has this index, InputError if the hosts disagree on how many they
    are or the port is in use.
    """
    if place.hosts == 1:
        return Links("127.0.0.1", {}, Met(1, 1))
    if place.generation >= MOST:
        raise PeerLost(f"generation {place.generation} is the last that hosts can count to: start all again")
    waiting = _Waiting(within, say)
    if place.index:
        return _go_to_first(place, port, waiting)
    if listener:
        return _wait_for_others(place, listener, waiting)
    with cast(socket.socket, listen(place, port)) as opened:
        return _wait_for_others(place, opened, waiting)


def listen(place: Place, port: int) -> socket.socket | None:
    """The listening socket on host 0, None on others. It is open before the checks that only host 0 makes."""
    if place.hosts == 1 or place.index:
        return None
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        problem = f"port {port} cannot be opened on host 0 ({error.strerror})"
        raise InputError(f"{problem}: choose another --meeting-port") from None


def reject_all(listener: socket.socket, place: Place, error: InputError, within: float = TELLING) -> None:
    """Tell the other hosts why all end as they connect, for `within` seconds or until all of them know."""
    reason, informed = (str(error), error.informed) if isinstance(error, Disagreement) else (f"host 0: {error}", set())
    until = time.monotonic() + within
    with contextlib.closing(Guests(place, listener, lambda _: None, ending=reason[:400])) as guests:
        while len(guests.informed | informed) < place.hosts - 1 and (left := until - time.monotonic()) > 0:
            guests.serve(min(left, 1))


class Links:
    """Open connections by host index: of host 0 to all others, of any other host to host 0."""

    def __init__(self, address: str, peers: dict[int, socket.socket], met: Met, received: bytes = b"") -> None:
        self.address = address  # of host 0
        self.generation, self.since = met
        self._peers, self._received = peers, received  # received: what host 0 has sent already

    def watch(self, ended: Callable[[int, int | None, bool], None]) -> None:
        """Call `ended(host, code, lost)` from a thread when a host ends: what its `leave` sent, or None and False."""
        for peer in self._peers.values():
            peer.setblocking(True)

        def listen(host: int, peer: socket.socket) -> None:
            received = self._received
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


class _Waiting:
    """The time limit of a wait, and its messages."""

    def __init__(self, within: float, say: Callable[[str], None]) -> None:
        self._begun = time.monotonic()
        self._within, self.say = within, say
        self._next = self._begun + EVERY

    def check(self, for_whom: str) -> None:
        """Raise PeerLost when time is up, and log every EVERY seconds; to be called about once a second."""
        now = time.monotonic()
        if now > self._begun + self._within:
            remedy = "start all again and they go on from the newest checkpoint"
            raise PeerLost(f"waited {self._within:.0f} s for {for_whom}, which is not there: {remedy}")
        if now >= self._next:
            self.say(f"waiting for {for_whom} ({now - self._begun:.0f} s)")
            self._next = now + EVERY


def _wait_for_others(place: Place, listener: socket.socket, waiting: _Waiting) -> Links:
    with contextlib.closing(Guests(place, listener, waiting.say)) as guests:
        while len(guests.hosts) < place.hosts - 1:
            missing = [index for index in range(1, place.hosts) if index not in guests.hosts]
            shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            waiting.check(f"host {shown} of {place.hosts}")
            guests.serve(seconds=1)
        peers = {index: peer for index, (peer, _) in guests.hosts.items()}
        address = str(next(iter(peers.values())).getsockname()[0]).removeprefix("::ffff:")
        past = [
            (place.generation, place.since),
            *((hello.generation, hello.since) for _, hello in guests.hosts.values()),
        ]
        generation, (last, since) = 1 + guests.newest, max(past)
        same = last == guests.newest and all(number for number, _ in past)
        met = Met(generation, since if same else generation)
        for peer in peers.values():
            with contextlib.suppress(OSError):  # a host that is gone is missed later, and all meet again
                peer.setblocking(True)
                peer.sendall(json.dumps({"go": True, **met._asdict()}).encode() + b"\n")
        return Links(address, peers, met)


def _go_to_first(place: Place, port: int, waiting: _Waiting) -> Links:
    hello = Hello(place.start, place.index, place.hosts, place.generation, place.since, uuid.uuid4().hex)
    awaited, reason = f"an answer of {place.head}, port {port}, where a program listens", ""
    while True:
        waiting.check(f"host 0 ({place.head}, port {port}){reason}")
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(_connect(place.head, port))
                notice_death(connection)
                connection.sendall(hello.line())
                answer, rest = _answer(connection, lambda: waiting.check(awaited))
                if answer.get("go"):
                    met = Met.read(answer)
                    stack.pop_all()
                    return Links(str(connection.getpeername()[0]).removeprefix("::ffff:"), {0: connection}, met, rest)
            except socket.gaierror as error:
                answer = {"no": f"no address of that name ({error.strerror})"}
            except OSError:
                answer = {}
            except (ValueError, TypeError, KeyError, RecursionError):
                answer = {"no": "another program answers there"}
            refusal = printable(str(answer.get("no", "")))
            if answer.get("end"):
                raise InputError(refusal or "host 0 rejected this one")
            if answer.get("leave"):
                raise PeerLost(refusal or "host 0 has another host in this one's place")
            reason = f": {refusal}" if refusal else ""
        time.sleep(0.5)


def _connect(name: str, port: int) -> socket.socket:
    """Connect to one of a name's addresses, in random order, since one may be that of a pod of an earlier start."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
    random.shuffle(addresses)
    problem = OSError(f"no address of {name}")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=5)
        except OSError as error:
            problem = error
    raise problem


def _answer(connection: socket.socket, check: Callable[[], None]) -> tuple[dict[str, Any], bytes]:
    """Host 0's answer, {} if it closes the connection, and the bytes that followed it."""
    connection.settimeout(1)
    data = b""
    while b"\n" not in data:
        check()
        try:
            part = connection.recv(4096)
        except TimeoutError:
            continue
        data += part
        if not part:
            return {}, b""
        if len(data) > 4096:
            raise ValueError("too long for an answer")
    line, _, rest = data.partition(b"\n")
    answer = json.loads(line)
    return (answer if isinstance(answer, dict) else {}), rest


def interface_of(address: str) -> str:
    """The network interface by which this host reaches an address; '' if unknown."""
    with contextlib.suppress(OSError):
        family = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 1))
            mine = probe.getsockname()[0].removeprefix("::ffff:")
        for name, addresses in psutil.net_if_addrs().items():
            if mine in [entry.address.partition("%")[0] for entry in addresses]:
                return name
    return ""
