"""A proxy before an HTTP server that breaks the traffic on purpose, as networks and busy servers do, reproducibly."""

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tests.servers import free_port

PIECE = 256 * 1024  # bytes passed on at a time
ERRORS = {503: "SlowDown", 500: "InternalError"}  # what S3 asks its clients to retry: HTTP status and S3's code


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong. `refuse` and `refusing` concern connections, all other fields requests."""

    latency: float = 0
    """Seconds before each answer."""
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


class FaultProxy:
    """Listens on `endpoint`, a free port of loopback, and passes HTTP/1.1 on to (host, port); a context manager.

    Assign `faults` at any time: they hold for requests that begin afterwards. What happens is a function of the seed
    and the order of requests, so a client of one thread meets the same faults each time. `counts` has "requests",
    "bytes" (of answers' bodies passed on) and the number of each fault: "reset", "stall", "refuse", "error", "flip".
    `requests` has the method and path of each, in order: one of another test's client, late on a port taken again,
    shows there.
    """

    def __init__(self, host, port, *, seed=0):
        self.counts = Counter()
        self.requests = []
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.upstream = (host, port)
        self.connections = set()  # of clients
        self._random = random.Random(seed)
        self._lock = threading.Lock()  # of what is random, and of counts
        self._until_reset = 0
        self._unflipped = 0  # bodies since the last flip
        self._server = None
        self.faults = Faults()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def faults(self):
        """What goes wrong from now on."""
        return self._faults

    @faults.setter
    def faults(self, faults):
        with self._lock:
            self._faults = faults
            if faults.reset_every:
                self._until_reset = self._random.randint(*faults.reset_every)
        if faults.refusing:
            self.close()
        elif self._server is None:
            self._server = Server(("127.0.0.1", self.port), Handler)
            self._server.proxy = self
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        """Listen no more, and end all connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self.connections):
            end(connection)

    def count(self, what, number=1):
        with self._lock:
            self.counts[what] += number

    def chance(self, probability):
        with self._lock:
            return probability > 0 and self._random.random() < probability

    def choose_error(self):
        with self._lock:
            return self._random.choice(list(ERRORS.items()))

    def faults_of(self, path):
        """What may go wrong with a request that begins now."""
        faults = self._faults
        if faults.only in path:
            return faults
        return Faults(flip_always=faults.flip_always)

    def plan(self, faults, length, path, is_object):
        """After how many bytes of its body an answer stalls, and which byte is inverted; -1: none."""
        stall_at = -1
        flip_at = -1
        if self.chance(faults.stall) and length > 1:
            stall_at = self._random.randrange(1, length)
        if is_object and length:
            self._unflipped += length >= 1000
            overdue = self._unflipped * faults.flip > 3
            always = faults.flip_always and faults.flip_always in path
            if always or (length >= 1000 and (overdue or self.chance(faults.flip))):
                flip_at = self._random.randrange(length)
                self._unflipped = 0
        return stall_at, flip_at

    def bytes_until_reset(self, faults, wanted):
        """How many of the bytes wanted may be passed on before the connection is reset."""
        if faults.reset_every is None:
            return wanted
        with self._lock:
            passed = min(wanted, self._until_reset)
            self._until_reset -= passed
            if passed < wanted:
                self._until_reset = self._random.randint(*faults.reset_every)
        return passed


class Server(ThreadingHTTPServer):
    proxy: FaultProxy

    def process_request(self, request, client_address):
        if self.proxy.chance(self.proxy.faults.refuse):
            self.proxy.count("refuse")
            reset(request)
        else:
            super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    """A client's connection: its requests one after the other."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self):
        super().setup()
        self.server.proxy.connections.add(self.connection)

    def finish(self):
        self.server.proxy.connections.discard(self.connection)
        super().finish()

    def exchange(self):
        """Pass a request and its answer on, or answer with an error in the server's place."""
        proxy = self.server.proxy
        path = unquote(self.path.partition("?")[0])
        assert "Transfer-Encoding" not in self.headers, "boto3 sends no chunks"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        faults = proxy.faults_of(path)
        proxy.count("requests")
        proxy.requests.append((self.command, path))
        if proxy.chance(faults.errors):
            self.refuse(faults)
            return
        headers = dict(self.headers.items())
        headers.pop("Expect", None)  # it is answered here
        server = HTTPConnection(*proxy.upstream)
        try:
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            time.sleep(faults.latency)
            self.pass_on(answer, faults, path)
        except (OSError, HTTPException):
            reset(self.connection)  # one of the two has gone in the middle of something
            self.close_connection = True
        finally:
            server.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = exchange

    def refuse(self, faults):
        status, code = self.server.proxy.choose_error()
        time.sleep(faults.latency)
        self.server.proxy.count("error")
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>'
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def pass_on(self, answer, faults, path):
        """Pass an answer on, with its faults."""
        proxy = self.server.proxy
        whole = b""
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if answer.length is None:
            whole = answer.read()
            self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        left = len(whole) or answer.length or 0
        is_object = self.command == "GET" and answer.status in (200, 206) and "/" in path.strip("/")
        stall_at, flip_at = proxy.plan(faults, left, path, is_object)
        passed = 0
        while left > passed:
            piece = whole or answer.read(PIECE)
            if not piece:
                raise ConnectionResetError
            if passed <= flip_at < passed + len(piece):
                piece = inverted(piece, flip_at - passed)
                proxy.count("flip")
            allowed = len(piece)
            if stall_at >= 0:
                allowed = min(allowed, stall_at - passed)
            sent = proxy.bytes_until_reset(faults, allowed)
            self.wfile.write(piece[:sent])
            proxy.count("bytes", sent)
            passed += sent
            if sent < allowed:
                proxy.count("reset")
                raise ConnectionResetError
            if passed == stall_at:
                proxy.count("stall")
                self.connection.recv(1)  # until the client goes
                raise ConnectionResetError

    def log_message(self, *_):
        pass


def reset(connection):
    """Close a connection with RST: the other side gets ECONNRESET, not an end of file."""
    with contextlib.suppress(OSError):  # closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())


def end(connection):
    """End a connection that a thread may be waiting for."""
    with contextlib.suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)


def inverted(piece, at):
    return piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
