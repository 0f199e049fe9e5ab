"""Connections to host 0 while the hosts of a job meet: their greetings, and which of them are admitted."""

import contextlib
import json
import selectors
import socket
import time
from dataclasses import asdict, dataclass, fields
from typing import Self, cast

from naign.cluster.exit_codes import say
from naign.cluster.place import MOST, Place
from naign.errors import InputError, PeerLost, printable

SILENCE = 10.0  # seconds within which a connection must send its greeting


@dataclass(frozen=True, slots=True)
class Message:
    """What hosts send each other, each as a line of JSON."""

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Self:
        """Raises ValueError for a line that no host sends: other fields, other types, impossible numbers."""
        try:
            message = cls(**json.loads(line))
        except (TypeError, RecursionError):
            raise ValueError("other fields") from None
        for field in fields(message):
            value = getattr(message, field.name)
            if type(value) is not field.type or (field.type is int and not 0 <= value <= MOST):
                raise ValueError(f"{field.name} is out of bounds")
        return message


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The greeting that a host sends to host 0."""

    start: str
    index: int
    hosts: int
    generation: int  # the last meeting that it took part in; 0: none
    member: str  # random: it tells two hosts of one index apart


@dataclass(frozen=True, slots=True)
class Answer(Message):
    """What host 0 answers: `go` once all hosts are here, or why `no`."""

    go: bool = False
    generation: int = 0  # the number of this meeting
    since: int = 0  # the generation since which the hosts are the same; see Place
    no: str = ""
    end: bool = False  # all hosts end, for that reason
    leave: bool = False  # another host has the place of the one that greets


class Guests:
    """Connections to host 0: of hosts of this start, which are admitted, and of strangers, which are rejected. With
    `ending`, the reason why all hosts end, every host is sent that reason, none is admitted, and nothing is logged.
    """

    def __init__(self, place: Place, listener: socket.socket, ending: str = "") -> None:
        self.hosts: dict[int, tuple[socket.socket, Hello]] = {}
        self.newest = place.generation  # of all hosts ever admitted, including those that had to leave again
        self.informed: set[int] = set()  # hosts that were told why all end
        self._place, self._listener, self._ending = place, listener, ending
        listener.setblocking(False)
        self._greetings: dict[socket.socket, tuple[bytes, float]] = {}  # incomplete ones, and when they began
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def close(self) -> None:
        """Close connections whose greeting is incomplete; the hosts stay connected."""
        self._selector.close()
        for peer in self._greetings:
            peer.close()

    def serve(self, seconds: float) -> None:
        """Handle what arrives within so many seconds. InputError if all hosts have to end, PeerLost if this one has."""
        late = time.monotonic() - SILENCE
        for peer in [peer for peer, (_, since) in self._greetings.items() if since < late]:
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
        try:
            hello = Hello.read(line)
        except ValueError:
            self._refuse(peer, "a connection that is no host of this job was rejected")
        else:
            self._greet(peer, hello)

    def _greet(self, peer: socket.socket, hello: Hello) -> None:
        """Reject who is no host of this start, end all if two count the hosts differently, or admit a host."""
        index, hosts, expected, reason = hello.index, hello.hosts, self._place.hosts, self._ending
        if hosts != expected:
            reason = f"host {index} counts {hosts} hosts, host 0 counts {expected}: make NAIGN_HOSTS the same"
        if hello.start != self._place.start:
            shown = printable(hello.start, 80) or "unnamed"
            self._refuse(peer, f"a host {index} of another start of this job ({shown}) was rejected")
        elif not 0 < index < max(hosts, expected) or hello.generation >= MOST:
            self._refuse(peer, f"a connection that calls itself host {index} was rejected")
        elif self._ending:
            self.informed.add(index)
            self._refuse(peer, reason, end=True)
        elif reason:
            for other in (peer, *(other for other, _ in self.hosts.values())):
                self._drop(other)  # they connect anew, and `reject_all` tells them
            raise InputError(reason)
        else:
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
                self._refuse(peer, f"a host {index} {was}, was rejected: another has its place", leave=True)
                return
            self._refuse(before, f"host {index} came again, as another pod: the one before it has to leave", leave=True)
        elif before:
            self._drop(before)  # it has connected anew
        self.hosts[index], self.newest = (peer, hello), max(self.newest, hello.generation)

    def _refuse(self, peer: socket.socket, reason: str, *, end: bool = False, leave: bool = False) -> None:
        if not self._ending:
            say(reason)
        with contextlib.suppress(OSError):
            peer.send(Answer(no=reason, end=end, leave=leave).line())
        self._drop(peer)

    def _drop(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        self._greetings.pop(peer, None)
        for index in [index for index, (other, _) in self.hosts.items() if other is peer]:
            del self.hosts[index]
        peer.close()


def notice_death(connection: socket.socket) -> None:
    """Let TCP keep-alive detect within some ten seconds that the other machine died."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
