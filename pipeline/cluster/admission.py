"""Connections to host 0 while the hosts of a job meet: their greetings, and which of them are admitted."""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

from pipeline.cluster.place import MOST, Place
from pipeline.errors import InputError, PeerLost, printable

SILENCE = 10.0  # seconds within which a connection must send its greeting


class Met(NamedTuple):
    """The number of a meeting, and the number from which on the hosts were the same."""

    generation: int
    since: int  # see Place

    @classmethod
    def read(cls, message: dict[str, Any], most: int = MOST) -> Self:
        """Raises ValueError or KeyError for impossible numbers."""
        generation, since = _number(message, "generation", most), _number(message, "since", most)
        if since > generation:
            raise ValueError("a generation before its first")
        return cls(generation, since)


@dataclass(frozen=True, slots=True)
class Hello:
    """The greeting that a host sends to host 0."""

    start: str
    index: int
    hosts: int
    generation: int  # the last meeting that it took part in; 0: none
    since: int
    member: str  # random: it tells two hosts of one index apart

    def line(self) -> bytes:
        return json.dumps({name: getattr(self, name) for name in self.__slots__}).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Self | None:
        """The greeting; None if that is none."""
        try:
            message = json.loads(line)
            index, hosts = _number(message, "index"), _number(message, "hosts")
            met = Met.read(message, MOST - 1)  # this meeting is one more
            return cls(str(message["start"]), index, hosts, *met, str(message["member"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


class Disagreement(InputError):
    """Hosts disagree on how many they are. `informed`: the hosts that know."""

    def __init__(self, text: str, informed: set[int]) -> None:
        super().__init__(text)
        self.informed = informed


class Guests:
    """Connections to host 0: of hosts of this start, which are admitted, and of strangers, which are rejected.

    With `ending`, the reason why all hosts end, every host is told that reason and none is admitted.
    """

    def __init__(self, place: Place, listener: socket.socket, say: Callable[[str], None], ending: str = "") -> None:
        self.hosts: dict[int, tuple[socket.socket, Hello]] = {}
        self.newest = place.generation  # of all hosts ever admitted, including those that had to leave again
        self.informed: set[int] = set()  # hosts that were told why all end
        self._place, self._listener, self._say, self._ending = place, listener, say, ending
        listener.setblocking(False)
        self._greetings: dict[
            socket.socket, tuple[bytes, float]
        ] = {}  # incomplete ones, and when each sender connected
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def close(self) -> None:
        """Close connections whose greeting is incomplete; the hosts stay connected."""
        self._selector.close()
        for peer in self._greetings:
            peer.close()

    def serve(self, seconds: float) -> None:
        """Handle what arrives within so many seconds. Raises InputError if all hosts have to end, PeerLost if this one
        has to."""
        now = time.monotonic()
        for peer in [peer for peer, (_, since) in self._greetings.items() if since + SILENCE < now]:
            self._drop(peer)
        for key, _ in self._selector.select(timeout=seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif (peer := cast(socket.socket, key.fileobj)).fileno() >= 0:  # not dropped since
                self._read(peer)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
            peer.setblocking(False)
            notice_death(peer)
        except OSError:  # gone already, or too many
            time.sleep(0.01)
            return
        self._greetings[peer] = b"", time.monotonic()
        self._selector.register(peer, selectors.EVENT_READ)

    def _read(self, peer: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = peer.recv(4096)
        before, since = self._greetings.get(peer, (b"", 0.0))
        if not data or peer not in self._greetings or len(before) > 4096:
            self._drop(peer)
            return
        self._greetings[peer] = before + data, since
        line, complete, _ = (before + data).partition(b"\n")
        if not complete:
            return
        hello = Hello.read(line)
        index, refusal, end = judge(self._place, hello)
        if self._ending and not refusal:
            refusal, end = self._ending, True
        if refusal:
            others = [other for other, _ in self.hosts.values()] if end else []
            self.informed |= {index, *self.hosts} if end else set()
            self._refuse(refusal, peer, *others, end=end)
            if end and not self._ending:
                raise Disagreement(refusal, self.informed)
        elif hello:
            del self._greetings[peer]
            self._admit(peer, hello)

    def _admit(self, peer: socket.socket, hello: Hello) -> None:
        """Add a host, or choose between it and another one of its index. PeerLost if this host missed a meeting."""
        if 0 < self._place.generation < hello.generation:
            missed = f"host {hello.index} comes from generation {hello.generation}, this host 0 from an older one"
            raise PeerLost(f"{missed} ({self._place.generation}): another host 0 has its place")
        index = hello.index
        before, known = self.hosts.get(index, (None, None))
        if before and known and known.member != hello.member:
            if 0 < hello.generation < self.newest:
                was = f"of generation {hello.generation}, which came after generation {self.newest}"
                self._refuse(f"a host {index} {was}, was rejected: another has its place", peer, leave=True)
                return
            self._refuse(f"host {index} came again, as another pod: the one before it has to leave", before, leave=True)
        elif before:
            self._drop(before)  # it has connected anew
        self.hosts[index], self.newest = (peer, hello), max(self.newest, hello.generation)

    def _refuse(self, reason: str, *peers: socket.socket, **what: bool) -> None:
        self._say(reason)
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.send(json.dumps({"no": reason, **what}).encode() + b"\n")
        self._drop(peers[0])

    def _drop(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        self._greetings.pop(peer, None)
        for index in [index for index, (other, _) in self.hosts.items() if other is peer]:
            del self.hosts[index]
        peer.close()


def _number(message: dict[str, Any], name: str, most: int = MOST) -> int:
    """Raises ValueError where that is no integer from 0 to `most`."""
    if type(value := message[name]) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is out of bounds")
    return value


def judge(place: Place, hello: Hello | None) -> tuple[int, str, bool]:
    """The index of the host that sent a greeting, why it is rejected or '', and whether all hosts end for that."""
    if hello is None:
        return 0, "a connection that is no host of this job was rejected", False
    index, hosts = hello.index, hello.hosts
    if hello.start != place.start:
        shown = printable(hello.start, 80) or "unnamed"
        return index, f"a host {index} of another start of this job ({shown}) was rejected", False
    if not 0 < index < max(hosts, place.hosts):
        return index, f"a connection that calls itself host {index} was rejected", False
    if hosts != place.hosts:
        return index, f"host {index} counts {hosts} hosts, host 0 counts {place.hosts}: make NAIGN_HOSTS the same", True
    return index, "", False


def notice_death(connection: socket.socket) -> None:
    """Let TCP keep-alive detect within some ten seconds that the other machine died."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
