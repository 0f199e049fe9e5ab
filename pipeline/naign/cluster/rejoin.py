"""How the hosts of a job meet, learn of the loss of one, and meet again.

A host is in one of three states:

    waits    for all hosts of its start: host 0 listens, the others greet it (`Hosts.meet`)
    trains   while its ranks run: connections stay open, so that the end of another host shows at once (`Links`)
    ends     by itself or after another one: with the code that `Links.judge` makes of how the ranks ended

From `ends` a host that lost another one goes back to `waits`, in the same process and pod (`Links.may_meet_again`): the
orchestrator replaces only the host that was lost. A job of 2:4 hosts waits for a while once two are there, and trains
without the others; one that comes later ends the round of those that train (`Hosts.newcomer`), and all meet again.

A terminating pod of an earlier start has the name and index of one that is awaited, so every host names its start, and
host 0 rejects others. Hosts then use the address of host 0: its name may soon resolve to another pod. Meetings are
numbered by generation: one more than the largest that any host has seen. Of two hosts with one index the later one
stays, unless its generation is older; the other one must leave, so that they do not take turns.
"""

import asyncio
import contextlib
import json
import math
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import psutil

from naign.cluster.place import MOST, Place
from naign.errors import InputError, Outcome, PeerLost, Unavailable, printable

EVERY = 10.0  # seconds between two messages about the missing hosts
SILENCE = 10.0  # seconds within which a connection must send its greeting
FEWER = 1 / 15  # of the time to wait for hosts that are needed: to wait for more than these
SETTLED = 1 / 3  # of the same: from a meeting until hosts that come later interrupt the ranks
GRACE = 10.0  # seconds to wait for another host's code
SOON = 3.0  # seconds that ranks have to notice by themselves that another host is gone
LIMIT = 5  # starts in a row that may end early where no host was lost
LONG = 600.0  # seconds of training after which a start has not ended early
LINE = 4096  # bytes of a message, at most


def program() -> str:
    """The command as typed: `naign train` or `naign launch`."""
    if sys.argv[1:2] == ["train"]:
        return "naign train"
    return "naign launch"


def say(text: str) -> None:
    print(f"{program()}: {text}", file=sys.stderr, flush=True)


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
    ranks: int  # that this host starts
    generation: int  # the last meeting that it took part in; 0: none
    member: str  # random: it tells two hosts of one index apart


@dataclass(frozen=True, slots=True)
class Answer(Message):
    """What host 0 answers: `go` once all hosts are here, or why not."""

    go: bool = False
    generation: int = 0  # the number of this meeting
    port: int = 0  # of the ranks' store on host 0
    hosts: int = 1  # that have met
    number: int = 0  # of this host among them
    reason: str = ""
    code: int = 0  # the host ends with it; 0: it may come again


@dataclass(frozen=True, slots=True)
class End(Message):
    """What a host sends before it ends, or meets the others again: its code, and whether it knows of a lost host."""

    code: int
    lost: bool


class Links:
    """The other hosts of a generation: of host 0 all, of any other host only host 0; and how they ended."""

    def __init__(self, answer: Answer, address: str, writers: dict[int, asyncio.StreamWriter]) -> None:
        self.address = address  # of host 0
        self.port = answer.port
        self.generation = answer.generation
        self.hosts = answer.hosts
        self.number = answer.number
        self.codes: dict[int, int | None] = {}  # of hosts that ended; None: it vanished
        self.lost = False  # another host vanished
        self.ended_at = 0.0  # when the first of them ended, or vanished
        self.is_cause = False  # the others end because this host does
        self._writers = writers

    async def listen(self, host: int, reader: asyncio.StreamReader) -> None:
        """Wait until a host ends."""
        self.note(host, await _read_end(reader))

    def note(self, host: int, end: End | None) -> None:
        """Another host ended; None: it vanished."""
        lost = end is None or end.lost
        if not self.codes or (lost and not self.lost):
            self.ended_at = time.monotonic()
        self.lost = self.lost or lost
        self.codes[host] = end.code if end else None
        if self.codes[host] != Outcome.DONE and not self.is_cause:
            how = f"with code {end.code}" if end else "without a code: lost"
            say(f"host {host} ended {how}")

    def time_left(self, patience: float) -> float:
        """Seconds that this host's ranks have to end: `patience` after another host ended, fewer after one was lost."""
        if not self.codes:
            return float("inf")
        return self.ended_at + (SOON if self.lost else patience) - time.monotonic()

    async def judge(self, code: int, *, killed: bool, asked: object) -> int:
        """The exit code of this host whose ranks ended with `code`: a crash may be the consequence of a lost host.

        killed: a rank of this host was killed from outside, so that this host is the one that is lost.
        asked:  true once this host is to end without waiting for others
        """
        crashed = code not in (Outcome.DONE, Outcome.BAD_INPUT, Outcome.INTERRUPTED)
        if crashed and not killed and self._writers:
            await wait_for(lambda: self.codes or asked, GRACE)
            if code != Outcome.PEER_LOST and {*self.codes.values()} == {Outcome.PEER_LOST}:
                await wait_for(lambda: self.lost or asked, SOON)  # the host that they lost may still report its end
        self.is_cause = True
        if code == Outcome.PEER_LOST and Outcome.BAD_INPUT in self.codes.values():
            return Outcome.BAD_INPUT  # Slurm takes the highest of all hosts' codes
        if self.lost and crashed:
            return Outcome.PEER_LOST
        return code

    def may_meet_again(self, code: int) -> bool:
        """Whether this host, which would end with `code`, ends only because another one did."""
        return bool(self._writers) and code in (Outcome.PEER_LOST, Outcome.INTERRUPTED)

    def leave(self, code: int, *, lost: bool) -> None:
        """Send the others this host's exit code, and whether it knows of a host that was lost."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError, RuntimeError):  # that host is gone already
                writer.write(End(code, lost).line())
                writer.write_eof()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def interface(self) -> str:
        """The network interface by which this host reaches the others; '' if unknown."""
        for writer in self._writers.values():
            mine = _plain(writer.get_extra_info("sockname"))
            for name, addresses in psutil.net_if_addrs().items():
                if mine in [entry.address.partition("%")[0] for entry in addresses]:
                    return name
        return ""


@dataclass(slots=True)
class Guest:
    """A host that host 0 has admitted."""

    hello: Hello
    writer: asyncio.StreamWriter
    links: Links | None = None  # once all are here


class Hosts:
    """This host among those of its start, through all their meetings. A context: host 0 listens inside it."""

    def __init__(self, place: Place, *, port: int, ranks: int, within: float) -> None:
        self.generation = 0  # of the last meeting
        self.newcomer = False  # whether a host has come while those of the last meeting train
        self._early = 0  # starts in a row that ended early
        self._place = place
        self._port = port
        self._ranks = ranks
        self.within = within  # seconds to wait for the others
        self._member = uuid.uuid4().hex
        self._is_meeting = True
        self._guests: dict[int, Guest] = {}
        self._newest = 0  # of all hosts ever admitted, including those that had to leave again
        self._failure: InputError | Unavailable | PeerLost | None = None
        self._server: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._place.hosts > 1 and self._place.index == 0:
            listener = listen(self._port)
            self._server = await asyncio.start_server(self._receive, sock=listener, limit=LINE, backlog=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server:
            self._server.close()

    async def meet(self) -> Links:
        """Wait until every host of this start is connected.

        Raises PeerLost when time is up or another host has this index, InputError if hosts count each other
        differently, Unavailable if their ranks are not equally many.
        """
        if self._place.hosts == 1:
            links = Links(Answer(generation=1, port=free_port()), "127.0.0.1", {})
        elif self._place.index == 0:
            links = await self._gather()
        else:
            links = await self._join()
        self.generation = links.generation
        return links

    def note_training(self, links: Links, seconds: float, *, timeout: float, stopped: bool = False) -> None:
        """The ranks ran for so many seconds, of which they may have waited `timeout` for each other in vain, or were
        stopped. Raises Unavailable if starts end early again and again, without the loss of a host.
        """
        self._early += 1
        if seconds >= LONG + timeout or links.lost or stopped:
            self._early = 0
        if self._early >= LIMIT:
            remedy = "see the ranks' messages above, and whether hosts reach each other on all ports"
            raise Unavailable(f"{LIMIT} starts in a row ended early, and no host was lost: {remedy}")

    # Host 0.

    async def _gather(self) -> Links:
        self._guests = {}
        self._is_meeting = True
        self.newcomer = False
        check = _time_limit(self.within)
        others = range(1, self._place.hosts)
        enough = math.inf  # when enough are there
        while not self._failure and len(self._guests) < len(others):
            enough = min(enough, time.monotonic())
            if not self._place.is_elastic or len(self._guests) + 1 < self._place.least:
                enough = math.inf
            if time.monotonic() > enough + FEWER * self.within:
                break
            if enough == math.inf:
                missing = [str(index) for index in others if index not in self._guests]
                check(f"host {', '.join(missing[:8])} of {self._place.hosts}")
            await asyncio.sleep(0.1)
        if self._failure:
            raise self._failure
        self._newest += 1
        hosts = 1 + len(self._guests)
        answer = Answer(go=True, generation=self._newest, port=free_port(), hosts=hosts)
        writers = {index: guest.writer for index, guest in self._guests.items()}
        address = _plain(next(iter(writers.values())).get_extra_info("sockname"))
        links = Links(answer, address, writers)
        for number, (_, guest) in enumerate(sorted(self._guests.items()), 1):
            guest.links = links
            guest.writer.write(replace(answer, number=number).line())
        self._is_meeting = False
        return links

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection to host 0, to its end."""
        with contextlib.suppress(asyncio.CancelledError):  # this host ends, and asyncio would print a traceback last
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A greeting, the answer, and how that host ends."""
        notice_death(writer)
        line = b""
        with contextlib.suppress(ValueError, OSError):
            line = await asyncio.wait_for(reader.readline(), SILENCE)
        if not line:
            writer.close()
            return
        try:
            hello = Hello.read(line)
        except ValueError:
            if self._is_meeting:
                self._refuse(writer, "a connection that is no host of this job was rejected")
            writer.close()
            return
        if not self._is_meeting:
            mine = (self._place.start, self._place.hosts, self._ranks)
            if (hello.start, hello.hosts, hello.ranks) == mine and hello.index not in (0, *self._guests):
                self.newcomer = self._place.is_elastic
            writer.close()
            return
        if not self._admit(hello, writer):
            return
        guest = self._guests[hello.index]
        end = await _read_end(reader)
        if guest.links:  # the connection stays open: that host may wait for how this one ends
            guest.links.note(hello.index, end)
            return
        if self._guests.get(hello.index) is guest:
            del self._guests[hello.index]
        writer.close()

    def _admit(self, hello: Hello, writer: asyncio.StreamWriter) -> bool:
        """Whether a host is admitted; others are told why not, and all if this start cannot go on."""
        index = hello.index
        if hello.start != self._place.start:
            shown = printable(hello.start, 80) or "unnamed"
            self._refuse(writer, f"a host {index} of another start of this job ({shown}) was rejected")
            return False
        if not 0 < index < max(hello.hosts, self._place.hosts) or hello.generation >= MOST:
            self._refuse(writer, f"a connection that calls itself host {index} was rejected")
            return False
        self._failure = self._failure or self._why_all_end(hello)
        if self._failure:
            for guest in self._guests.values():
                self._tell(guest.writer)
            self._tell(writer)
            return False
        before = self._guests.get(index)
        if before and before.hello.member != hello.member:
            if 0 < hello.generation < self._newest:
                was = f"of generation {hello.generation}, which came after generation {self._newest}"
                reason = f"a host {index} {was}, was rejected: another has its place"
                self._refuse(writer, reason, Outcome.PEER_LOST)
                return False
            reason = f"host {index} came again, as another pod: the one before it has to leave"
            self._refuse(before.writer, reason, Outcome.PEER_LOST)
        elif before:
            before.writer.close()  # it has connected anew
        self._guests[index] = Guest(hello, writer)
        self._newest = max(self._newest, hello.generation)
        return True

    def _why_all_end(self, hello: Hello) -> InputError | Unavailable | PeerLost | None:
        """The error of a start with this host in it."""
        index = hello.index
        hosts = self._place.hosts
        if hello.hosts != hosts:
            counts = f"host {index} counts {hello.hosts} hosts, host 0 counts {hosts}"
            return InputError(f"{counts}: make NAIGN_HOSTS the same")
        if hello.ranks != self._ranks:
            counts = f"host {index} starts {hello.ranks} ranks, host 0 starts {self._ranks}"
            return Unavailable(f"{counts}: see whether a GPU is missing, or give all hosts the same --processes")
        if 0 < self.generation < hello.generation:
            missed = f"host {index} comes from generation {hello.generation}, this host 0 from an older one"
            return PeerLost(f"{missed} ({self.generation}): another host 0 has its place")
        return None

    def _tell(self, writer: asyncio.StreamWriter) -> None:
        """Tell a host why all end; one that has to leave alone tells others nothing: they find the other host 0."""
        error = self._failure
        if isinstance(error, InputError | Unavailable):
            self._refuse(writer, f"host 0: {error}"[:400], error.code)
        writer.close()

    def _refuse(self, writer: asyncio.StreamWriter, reason: str, code: int = 0) -> None:
        if not self._failure:
            say(reason)
        writer.write(Answer(reason=reason, code=code).line())
        writer.close()

    # The other hosts.

    async def _join(self) -> Links:
        place = self._place
        hello = Hello(place.start, place.index, place.hosts, self._ranks, self.generation, self._member)
        head = f"{place.head}, port {self._port}"
        check = _time_limit(self.within * (1 + FEWER * place.is_elastic))
        reason = ""
        while True:
            check(f"host 0 ({head}){reason}")
            try:
                # Of several addresses one may be that of a pod of an earlier start, or of a machine that is gone.
                opening = asyncio.open_connection(place.head, self._port, limit=LINE, happy_eyeballs_delay=2)
                reader, writer = await asyncio.wait_for(opening, 10)
                notice_death(writer)
                writer.write(hello.line())
                answer = await _read_answer(reader, lambda: check(f"an answer of {head}, where a program listens"))
            except socket.gaierror as error:
                reason = f": no address of that name ({error.strerror})"
            except ValueError:
                reason = ": another program answers there"
            except OSError:
                reason = ""
            else:
                if answer.go:
                    links = Links(answer, _plain(writer.get_extra_info("peername")), {0: writer})
                    self._task = asyncio.create_task(links.listen(0, reader))
                    return links
                writer.close()
                refusal = printable(answer.reason) or "host 0 rejected this one"
                for kind in (InputError, Unavailable, PeerLost):
                    if answer.code == kind.code:
                        raise kind(refusal)
                reason = f": {refusal}"
            await asyncio.sleep(0.5)


async def _read_answer(reader: asyncio.StreamReader, check: Callable[[], None]) -> Answer:
    """Host 0's answer. OSError if the connection closes, ValueError if another program answers."""
    line = None
    while line is None and not reader.exception():  # the connection's own error may be a TimeoutError, too
        check()
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(reader.readline(), 1)
    if not line:
        raise ConnectionAbortedError
    return Answer.read(line)


async def _read_end(reader: asyncio.StreamReader) -> End | None:
    """How the host behind a connection ends; None if it vanishes."""
    try:
        return End.read(await reader.readline())
    except (ValueError, OSError):
        return None


async def wait_for(condition: Callable[[], object], within: float) -> None:
    """Return when the condition holds, or after `within` seconds."""
    end = time.monotonic() + within
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.05)


def _time_limit(within: float) -> Callable[[str], None]:
    """Returns a function for the wait loop: it logs who is missing every EVERY seconds and raises PeerLost after
    `within`.
    """
    begun = time.monotonic()
    logged = begun

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


def listen(port: int) -> socket.socket:
    """A listening socket on the port; InputError if it is in use."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise InputError(f"port {port} cannot be opened ({error.strerror}): choose another --port") from None


def free_port() -> int:
    """A port that no program on this host has open."""
    with listen(0) as listener:
        return int(listener.getsockname()[1])


def notice_death(writer: asyncio.StreamWriter) -> None:
    """Let TCP keep-alive detect within some ten seconds that the other machine died."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _plain(address: Any) -> str:
    """The address of a socket, an IPv4 one not written as IPv6."""
    return str(address[0]).removeprefix("::ffff:")
