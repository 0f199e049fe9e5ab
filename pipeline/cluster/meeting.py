"""All hosts of a job wait for each other before any of them starts its ranks.

A launcher's own rendezvous admits whoever connects, and a pod of an earlier start of the same job that still terminates
has the name and the index of one that is awaited. Here every host says which start it belongs to and host 0 rejects the
others. Hosts then use the address at which host 0 answered, since its name may resolve to another pod a moment later.

The connections stay open while the ranks run. A host that dies closes its own, so that the others learn at once what a
collective may not report for minutes.
"""

import contextlib
import json
import random
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import psutil

from pipeline.cluster.place import Place
from pipeline.errors import InputError, PeerLost, printable

EVERY = 10.0  # seconds between two messages about the missing hosts
SILENCE = 10.0  # seconds that a connection has for its greeting
TELLING = 30.0  # seconds that host 0 stays to report why it ends, to hosts that start later


def meet(
    place: Place,
    *,
    port: int,
    within: float = 900,  # seconds
    say: Callable[[str], None] = print,
    listener: socket.socket | None = None,
) -> "Links":
    """Wait until every host of this start is here; on host 0 `listener` is what `listen` opened, if it was called.

    Raises PeerLost when time is up, InputError where the hosts disagree on how many they are or the port is taken.
    """
    if place.hosts == 1:
        return Links("127.0.0.1", {})
    waiting = _Waiting(within, say)
    if place.index:
        return _go_to_first(place, port, waiting)
    if listener:
        return _wait_for_others(place, listener, waiting)
    with cast(socket.socket, listen(place, port)) as opened:
        return _wait_for_others(place, opened, waiting)


def listen(place: Place, port: int) -> socket.socket | None:
    """The listening socket on host 0, None on others. Opened before the checks that only host 0 makes."""
    if place.hosts == 1 or place.index:
        return None
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        problem = f"port {port} cannot be opened on host 0 ({error.strerror})"
        raise InputError(f"{problem}: choose another --meeting-port") from None


def turn_away(listener: socket.socket, place: Place, reason: str, within: float = TELLING) -> None:
    """Report to the other hosts why all end, as they connect: for `within` seconds, or until all have been informed."""
    informed: set[int] = set()
    until = time.monotonic() + within
    while len(informed) < place.hosts - 1 and (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(1)
                index, no, end = _judge(place, peer.recv(4096).partition(b"\n")[0])
                peer.sendall(json.dumps({"no": no or reason[:400], "end": end or not no}).encode() + b"\n")
                informed |= {index} if end or not no else set()


class Links:
    """Connections to the other hosts by their index: of host 0 to all others, of another host to host 0."""

    def __init__(self, address: str, peers: dict[int, socket.socket], received: bytes = b"") -> None:
        self.address = address  # of host 0
        self._peers, self._received = peers, received  # host 0 may have sent its code already

    def watch(self, ended: Callable[[int, int | None, bool], None]) -> None:
        """Call `ended(host, code, lost)` from a thread when a host ends: as sent by its `leave`, or None and False."""
        for peer in self._peers.values():
            peer.setblocking(True)

        def listen(host: int, peer: socket.socket) -> None:
            received = self._received
            with contextlib.suppress(OSError):
                while part := peer.recv(64):
                    received += part
            found = re.fullmatch(rb"(\d{1,9})( lost)?\n", received)
            ended(host, int(found[1]) if found else None, bool(found and found[2]))

        for host, peer in self._peers.items():
            threading.Thread(target=listen, args=(host, peer), name=f"host {host}", daemon=True).start()

    def leave(self, code: int, *, lost: bool = False) -> None:
        """Send the others this host's exit code, and whether it knows of a host that was lost."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"{code}{' lost' * lost}\n".encode())
                peer.shutdown(socket.SHUT_WR)


class _Waiting:
    """The time limit of a wait, and the messages meanwhile."""

    def __init__(self, within: float, say: Callable[[str], None]) -> None:
        self._begun = time.monotonic()
        self._within, self.say = within, say
        self._next = self._begun + EVERY

    def check(self, for_whom: str) -> None:
        """Raise PeerLost when time is up, and report now and then; to be called about every second."""
        now = time.monotonic()
        if now > self._begun + self._within:
            raise PeerLost(f"waited {self._within:.0f} s for {for_whom}")
        if now >= self._next:
            self.say(f"waiting for {for_whom} ({now - self._begun:.0f} s)")
            self._next = now + EVERY


def _wait_for_others(place: Place, listener: socket.socket, waiting: _Waiting) -> Links:
    with contextlib.closing(_Guests(place, listener, waiting.say)) as guests:
        while len(guests.hosts) < place.hosts - 1:
            missing = [index for index in range(1, place.hosts) if index not in guests.hosts]
            shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            waiting.check(f"host {shown} of {place.hosts}")
            guests.serve(seconds=1)
        address = str(next(iter(guests.hosts.values())).getsockname()[0]).removeprefix("::ffff:")
        for peer in guests.hosts.values():
            with contextlib.suppress(OSError):  # who is gone now will be missed, and all start again
                peer.setblocking(True)
                peer.sendall(b'{"go": true}\n')
        return Links(address, guests.hosts)


class _Guests:
    """Whoever connects to host 0: hosts of this start, and strangers that are sent away."""

    def __init__(self, place: Place, listener: socket.socket, say: Callable[[str], None]) -> None:
        self.hosts: dict[int, socket.socket] = {}
        self._place, self._listener, self._say = place, listener, say
        self._greetings: dict[socket.socket, tuple[bytes, float]] = {}  # incomplete, and when its sender connected
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def close(self) -> None:
        """Forget those whose greeting is not complete; the hosts stay connected."""
        self._selector.close()
        for peer in self._greetings:
            peer.close()

    def serve(self, seconds: float) -> None:
        """Handle what arrives within so many seconds. Raises InputError where all hosts have to end."""
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
            _notice_death(peer)
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
        index, refusal, end = _judge(self._place, line)
        if refusal:
            self._say(refusal)
            for other in (peer, *self.hosts.values()) if end else (peer,):
                with contextlib.suppress(OSError):
                    other.send(json.dumps({"no": refusal, "end": end}).encode() + b"\n")
            self._drop(peer)
            if end:
                raise InputError(refusal)
            return
        del self._greetings[peer]
        if index in self.hosts:
            self._say(f"host {index} came again: the one before it is forgotten")
            self._drop(self.hosts[index])  # its pod was replaced
        self.hosts[index] = peer

    def _drop(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        self._greetings.pop(peer, None)
        for index in [index for index, found in self.hosts.items() if found is peer]:
            del self.hosts[index]
        peer.close()


def _judge(place: Place, line: bytes) -> tuple[int, str, bool]:
    """Of a greeting: the host's index, why it is rejected or '', and whether all hosts must end for that reason."""
    try:
        hello = json.loads(line)
        start, index, hosts = str(hello["start"]), int(hello["index"]), int(hello["hosts"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0, "somebody who is no host of this job was turned away", False
    if start != place.start:
        shown = printable(start, 80) or "unnamed"
        return index, f"a host {index} of another start of this job ({shown}) was turned away", False
    if not 0 < index < max(hosts, place.hosts):
        return index, f"somebody who calls itself host {index} was turned away", False
    if hosts != place.hosts:
        return index, f"host {index} counts {hosts} hosts, host 0 counts {place.hosts}: make NAIGN_HOSTS the same", True
    return index, "", False


def _go_to_first(place: Place, port: int, waiting: _Waiting) -> Links:
    hello = json.dumps({"start": place.start, "index": place.index, "hosts": place.hosts}).encode() + b"\n"
    awaited, reason = f"an answer of {place.head}, port {port}, where somebody listens", ""
    while True:
        waiting.check(f"host 0 ({place.head}, port {port}){reason}")
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(_connect(place.head, port))
                _notice_death(connection)
                connection.sendall(hello)
                answer, rest = _answer(connection, lambda: waiting.check(awaited))
            except socket.gaierror as error:
                answer = {"no": f"no address of that name ({error.strerror})"}
            except OSError:
                answer = {}
            except (ValueError, RecursionError):
                answer = {"no": "another program answers there"}
            if answer.get("go"):
                stack.pop_all()
                return Links(str(connection.getpeername()[0]).removeprefix("::ffff:"), {0: connection}, rest)
            refusal = printable(str(answer.get("no", "")))
            if answer.get("end"):
                raise InputError(refusal or "host 0 turned this one away")
            reason = f": {refusal}" if refusal else ""
        time.sleep(0.5)


def _connect(name: str, port: int) -> socket.socket:
    """Connect to one of a name's addresses, in random order: a pod of an earlier start may still be among them."""
    addresses = [str(found[4][0]) for found in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
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


def _notice_death(connection: socket.socket) -> None:
    """Let TCP keep-alive detect within some ten seconds that the other machine died."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def interface_of(address: str) -> str:
    """The network interface by which this host reaches an address; '' if unknown."""
    with contextlib.suppress(OSError):
        family = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 1))
            mine = probe.getsockname()[0].removeprefix("::ffff:")
        for name, found in psutil.net_if_addrs().items():
            if mine in [one.address.partition("%")[0] for one in found]:
                return name
    return ""
