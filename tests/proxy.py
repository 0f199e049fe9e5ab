"""A proxy before an HTTP server that breaks the traffic on purpose, as networks and busy servers do, reproducibly."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, Self
from urllib.parse import unquote

from tests.servers import free_port

PIECE = 256 * 1024
"""Bytes read and passed on at a time."""

ERRORS = {503: ("Slow Down", "SlowDown"), 500: ("Internal Server Error", "InternalError")}
"""What S3 asks its clients to retry: HTTP status, its name and S3's code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong. `refuse` and `refusing` concern connections, all other fields requests."""

    latency: float = 0
    """Seconds before each answer."""
    rate: float = 0
    """Bytes a second of each answer's body; 0: as fast as it goes."""
    reset_every: tuple[int, int] | None = None
    """A connection is reset (RST) in the middle of a body each time that the whole proxy has passed on as many bytes of
    bodies as are drawn from this range, ends included."""
    stall: float = 0
    """Probability that an answer stops in the middle of its body: the connection stays open, in silence."""
    refuse: float = 0
    """Probability that a new connection is reset at once."""
    refusing: bool = False
    """Nothing listens, and the connections there were are reset: the server is down."""
    errors: float = 0
    """Probability that a request gets 503 SlowDown or 500 InternalError and never reaches the server."""
    flip: float = 0
    """Probability that one byte is inverted in the body of a GET of an object, if it has 1,000 bytes or more; certain
    after three times as many such bodies without one as it takes on average. Listings are left alone: nothing could
    tell that a name in them is wrong."""
    flip_always: str = ""
    """One byte is inverted in each body of a GET of an object whose path contains this, whatever `only` says."""
    only: str = ""
    """If set: requests are disturbed only if their path (/bucket/key, without %XX) contains this."""


class Head(NamedTuple):
    """The head of a request or an answer."""

    raw: bytes
    words: list[str]
    """The first line's: method, target and version, or version, status and reason."""
    fields: dict[str, str]
    """Values by lower-case name."""

    @property
    def method(self) -> str:
        """A request's: GET, PUT, ..."""
        return self.words[0]

    @property
    def path(self) -> str:
        """A request's, as "/bucket/key"."""
        return unquote(self.words[1].partition("?")[0])

    @property
    def status(self) -> str:
        """An answer's, three digits."""
        return self.words[1]


class Wire(NamedTuple):
    """One connection, to a client or to the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class FaultProxy:
    """Listens on `endpoint`, a free port of loopback, and passes HTTP/1.1 on to (host, port); a context manager.

    Assign `faults` at any time: they hold for requests that begin afterwards. What happens is a function of the seed
    and the order of requests, so a client of one thread meets the same faults each time. `counts` has "requests",
    "bytes" (of answers' bodies passed on) and the number of each fault: "reset", "stall", "refuse", "error", "flip".
    `requests` has the method and path of each, in order: one of another test's client, late on a port taken again,
    shows there.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._upstream = (host, port)
        self._random = random.Random(seed)
        self._faults = Faults()
        self._until_reset = self._unflipped = 0
        self._listener: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self.faults = Faults()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def faults(self) -> Faults:
        """What goes wrong from now on."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._run(self._apply(faults))

    def close(self) -> None:
        """Reset all connections and end the thread. Nothing happens the second time."""
        if self._loop.is_closed():
            return
        self._run(self._down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    # Everything below runs in the proxy's own thread.

    async def _apply(self, faults: Faults) -> None:
        self._faults = faults
        self._until_reset = self._random.randint(*faults.reset_every) if faults.reset_every else 0
        if faults.refusing:
            await self._down()
        elif self._listener is None:
            self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=PIECE)

    async def _down(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        tasks = list(self._connections)
        for task in tasks:
            _reset(self._connections[task])
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._faults.refusing:  # it was on its way when the listener closed
            _reset(writer)
            return
        if self._chance(self._faults.refuse):
            self.counts["refuse"] += 1
            _reset(writer)
            return
        writer.transport.set_write_buffer_limits(high=0)  # what is counted as passed on is in the kernel's hands
        task = asyncio.create_task(self._serve(Wire(reader, writer)))
        self._connections[task] = writer
        task.add_done_callback(self._connections.pop)

    async def _serve(self, client: Wire) -> None:
        """A client's connection: its requests one after the other, over one connection to the server."""
        server: Wire | None = None
        try:
            while request := await _read_head(client.reader):
                self.counts["requests"] += 1
                self.requests.append((request.method, request.path))
                if self._chance(self._faults_of(request).errors):
                    await self._refuse(request, client)
                    continue
                if server is None or _has_gone(server):
                    if server is not None:
                        server.writer.close()
                    server = Wire(*await asyncio.open_connection(*self._upstream, limit=PIECE))
                if not await self._exchange(request, client, server):
                    break
        except (OSError, asyncio.IncompleteReadError):
            client.writer.transport.abort()  # one of the two has gone in the middle of something
        finally:
            client.writer.close()
            if server is not None:
                server.writer.close()

    def _faults_of(self, request: Head) -> Faults:
        """What may go wrong with a request that begins now."""
        return self._faults if self._faults.only in request.path else Faults(flip_always=self._faults.flip_always)

    async def _refuse(self, request: Head, client: Wire) -> None:
        """Answer with an error in the server's place, after the whole request."""
        faults = self._faults_of(request)
        status, (reason, code) = self._random.choice(list(ERRORS.items()))
        if "expect" in request.fields:
            client.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "content-length" in request.fields:
            async for _ in _body(client.reader, request):
                pass
        await asyncio.sleep(faults.latency)
        self.counts["error"] += 1
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{reason}</Message></Error>'
        lines = [f"HTTP/1.1 {status} {reason}", "Content-Type: application/xml", f"Content-Length: {len(body)}", "", ""]
        client.writer.write(("\r\n".join(lines) + ("" if request.method == "HEAD" else body)).encode())
        await client.writer.drain()

    async def _exchange(self, request: Head, client: Wire, server: Wire) -> bool:
        """Pass a request and its answer on; returns whether the connection may take another request.

        The request's body goes on beside the answer: after Expect: 100-continue the first waits for the second, and a
        server may refuse a body that it has not read.
        """
        faults = self._faults_of(request)
        upload = asyncio.create_task(_upload(request, client, server))
        try:
            while (answer := await _read_head(server.reader)) and answer.status == "100":
                client.writer.write(answer.raw)
            if not answer:
                return False
            await asyncio.sleep(faults.latency)
            whole = await self._answer(request, faults, answer, client, server)
            if not whole or answer.fields.get("connection", "").lower() == "close":
                return False
            await upload
            return True
        finally:
            upload.cancel()
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await upload

    async def _answer(self, request: Head, faults: Faults, answer: Head, client: Wire, server: Wire) -> bool:
        """Pass an answer on, with its faults; returns whether all of it went and the connection stays usable."""
        client.writer.write(answer.raw)
        if request.method == "HEAD" or answer.status in ("204", "304"):
            await client.writer.drain()
            return True
        stall_at, flip_at = self._plan(request, faults, answer)
        most = min(PIECE, max(1, int(faults.rate / 20))) if faults.rate else PIECE
        begin, passed = self._loop.time(), 0
        async for piece in _body(server.reader, answer, most=most):
            stalls = resets = False
            if stall_at is not None and passed + len(piece) >= stall_at:
                stalls, piece = True, piece[: stall_at - passed]
            if faults.reset_every is not None:
                if len(piece) > self._until_reset:
                    resets, piece = True, piece[: self._until_reset]
                    self._until_reset += self._random.randint(*faults.reset_every)
                self._until_reset -= len(piece)
            if flip_at is not None and passed <= flip_at < passed + len(piece):
                self.counts["flip"] += 1
                self._unflipped = 0
                piece = _flipped(piece, flip_at - passed)
            if faults.rate:
                await asyncio.sleep(begin + (passed + len(piece)) / faults.rate - self._loop.time())
            self.counts["bytes"] += len(piece)
            client.writer.write(piece)
            await client.writer.drain()
            passed += len(piece)
            if resets:
                self.counts["reset"] += 1
                _reset(client.writer)
                return False
            if stalls:
                self.counts["stall"] += 1
                while not _has_gone(client):
                    await asyncio.sleep(0.01)
                return False
        await client.writer.drain()
        return "content-length" in answer.fields

    def _plan(self, request: Head, faults: Faults, answer: Head) -> tuple[int | None, int | None]:
        """After how many bytes of its body an answer stalls, and which byte is inverted, if any."""
        stall_at = flip_at = None
        length = int(answer.fields.get("content-length", 0))  # 0 also where nobody knows
        if self._chance(faults.stall) and length != 1:  # one byte has no middle
            stall_at = self._random.randrange(1, length) if length else 1
        if request.method == "GET" and answer.status in ("200", "206") and "/" in request.path.strip("/") and length:
            always = faults.flip_always and faults.flip_always in request.path
            self._unflipped += length >= 1000
            overdue = self._unflipped * faults.flip > 3
            if always or (length >= 1000 and (overdue or self._chance(faults.flip))):
                flip_at = self._random.randrange(length)
        return stall_at, flip_at

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST: the other side gets ECONNRESET, not an end of file."""
    with contextlib.suppress(OSError):  # closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _has_gone(wire: Wire) -> bool:
    return wire.reader.at_eof() or wire.reader.exception() is not None


def _flipped(piece: bytes, at: int) -> bytes:
    return piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]


async def _read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head; None if the other side has closed the connection before it."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return Head(raw, first.split(" ", 2), {name.lower(): value.strip() for name, _, value in fields})


async def _upload(request: Head, client: Wire, server: Wire) -> None:
    server.writer.write(request.raw)
    if "content-length" in request.fields:
        async for piece in _body(client.reader, request):
            server.writer.write(piece)
            await server.writer.drain()


async def _body(reader: asyncio.StreamReader, head: Head, *, most: int = PIECE) -> AsyncIterator[bytes]:
    """The body after a head, at most so many bytes at a time. One of unknown length ends with the connection."""
    assert "transfer-encoding" not in head.fields, "SeaweedFS and boto3 send no chunks"
    left = int(head.fields["content-length"]) if "content-length" in head.fields else None
    while left != 0 and (data := await reader.read(most if left is None else min(left, most))):
        left = None if left is None else left - len(data)
        yield data
    if left:
        raise asyncio.IncompleteReadError(b"", left)
