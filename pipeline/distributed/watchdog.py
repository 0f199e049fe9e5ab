"""Ends a rank that makes no progress, and says which ranks it waited for and where they are.

Every rank posts what it is doing in the process group's store, over a connection of its own, since the main thread may
hold the group's connection while it waits. Clocks of different hosts are never compared: a rank measures by its own
clock how long it has been idle, and takes another for silent if its post does not change between two readings.
"""

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal, Self, TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, without an export
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from pipeline.errors import FAILED

PATIENCE = 5.0
"""Seconds that one exchange with the store may take."""

NAMED = 8
"""The most ranks that one message names."""

Answer = TypeVar("Answer")
State = Literal["at work", "left", "ended"]


@dataclass(frozen=True, slots=True)
class Post:
    """What a rank says of itself."""

    phase: str
    round: int
    order: int  # of the phase among those entered in this round, from 1
    beats: int  # since the phase began
    idle: float  # seconds without progress when it was posted, by the poster's clock
    host: str
    state: State = "at work"  # left: the watchdog's context was left; ended: its watchdog ended the rank
    number: int = 0  # of this rank's posts

    @property
    def where(self) -> str:
        return f"{self.phase} of round {self.round}"


@dataclass(frozen=True, slots=True)
class Heard:
    """The last post that was read of another rank, with times by the reader's clock."""

    post: Post
    ago: float  # seconds since it was first read
    unchanged: float  # seconds from its first reading to the newest one


class Watchdog:
    """Ends the process with exit code 1 when neither `enter` nor `beat` was called for `timeout` seconds.

    All ranks must enter the same phases of a round in the same order, since that tells who is behind. A process can run
    one at a time: a thread that never releases the interpreter is ended by faulthandler, which has one timer.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        timeout: float,  # seconds without progress; below the process group's, which would fail first
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),  # before the stacks
        every: float = 5.0,  # seconds from post to post; at most a tenth of timeout
    ) -> None:
        for name, value in (("timeout", timeout), ("every", every)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"the watchdog's {name} is {value} seconds: more than 0 and finite, such as 600")
        self.phase, self.round = "setup", 0
        self._order, self._beats, self._since = 0, 0, time.monotonic()
        self._rank, self._timeout, self._say, self._every = rank, timeout, say, min(every, timeout / 10)
        self._peers = Peers(rank, world)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str, round: int) -> None:
        """This rank begins a phase of a round, which is progress."""
        self._order = self._order + 1 if round == self.round else 1
        self.phase, self.round, self._beats, self._since = phase, round, 0, time.monotonic()

    def beat(self) -> None:
        """Progress inside a phase: a step, a block. Costs two assignments and a look at the clock."""
        self._beats += 1
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        self._devnull = os.open(os.devnull, os.O_WRONLY)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(3 * PATIENCE)  # an exchange under way, and the last post

    def _post(self, state: State = "at work") -> Post:
        idle = time.monotonic() - self._since
        return Post(self.phase, self.round, self._order, self._beats, idle, socket.gethostname(), state)

    def _watch(self) -> None:
        """Post, and end the process once there was no progress for too long. The body of the thread."""
        read_at = 0.0
        try:
            while not self._stop.is_set():
                # If this thread cannot run for so long, no Python code can: faulthandler ends the process.
                exit_after(self._timeout + self._every + 3 * PATIENCE, file=2)
                now, idle = time.monotonic(), time.monotonic() - self._since
                if idle >= self._timeout:
                    self._give_up()
                    continue
                # Only ranks that wait read, and less often than they post, since each reads the posts of all.
                read = idle > 2 * self._every and now >= read_at
                read_at = now + max(self._every, self._timeout / 20) if read else read_at
                self._peers.exchange(self._post(), read=read)
                self._stop.wait(max(0.0, min(self._every, self._since + self._timeout - time.monotonic())))
            if not self._peers.lost:
                self._peers.exchange(self._post("left"))
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.close(self._devnull)

    def _give_up(self) -> None:
        """Say why and end the process, unless there is progress after all."""
        exit_after(4 * PATIENCE, file=self._devnull)  # even if `say` hangs, or a full pipe behind stderr
        since, peers = self._since, self._peers
        peers.exchange(self._post(), read=True)
        if self._stop.is_set() or self._since != since:
            return
        try:
            silence = min(3 * self._every + 2, self._timeout / 2)  # on a busy machine a post may come late
            heard = peers.heard() if peers.reachable else None
            text = describe(self._rank, peers.world, self._post(), heard, silence=silence, lost=peers.lost)
            with suppress(Exception):  # the stacks are worth as much
                self._say(text)
            if not peers.lost:
                peers.exchange(self._post("ended"))
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            faulthandler.dump_traceback(file=2)
        finally:
            os._exit(FAILED)


def exit_after(seconds: float, *, file: int) -> None:
    """Unless called again or cancelled: write the stacks to `file` and exit with code 1, without the interpreter."""
    with suppress(RuntimeError):  # the container allows no more threads: do without
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)


class Peers:
    """The posts of all ranks, in the store. Used by the watchdog's thread alone."""

    def __init__(self, rank: int, world: int) -> None:
        self.world, self.lost = world, ""  # lost: why the last exchange failed
        self._rank, self._number = rank, 0
        self._store: Store | None = None
        self._posts: dict[int, tuple[Post, float]] = {}  # with the time of its first reading
        self._read_at = 0.0

    @property
    def reachable(self) -> bool:
        """Whether there are other ranks, in a process group."""
        return self.world > 1 and dist.is_available() and dist.is_initialized()

    def exchange(self, post: Post, *, read: bool = False) -> None:
        """Post, and read the posts of all if `read`. Raises nothing and takes PATIENCE seconds at most."""
        if not self.reachable:
            return
        self._number += 1
        text = json.dumps(asdict(post) | {"number": self._number})
        store, self._store = self._store, None  # one that failed, or still hangs, is not used again
        try:
            self._store, posts = call_within(PATIENCE, lambda: self._exchange(store or connect(), text, read))
        except Exception as error:
            self.lost = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return
        self.lost = ""
        if read:
            self._read_at = time.monotonic()
        for rank, found in posts.items():
            if rank not in self._posts or self._posts[rank][0].number != found.number:
                self._posts[rank] = found, self._read_at

    def heard(self) -> dict[int, Heard]:
        """What the other ranks posted, as far as it was read."""
        now = time.monotonic()
        return {rank: Heard(post, now - at, self._read_at - at) for rank, (post, at) in self._posts.items()}

    def _exchange(self, store: Store, text: str, read: bool) -> tuple[Store, dict[int, Post]]:
        store.set(str(self._rank), text)
        ranks = [rank for rank in range(self.world) if rank != self._rank] if read else []
        if ranks and not store.check([str(rank) for rank in ranks]):  # reading a missing key would block
            ranks = [rank for rank in ranks if store.check([str(rank)])]
        values = store.multi_get([str(rank) for rank in ranks]) if ranks else []
        return store, {rank: Post(**json.loads(value)) for rank, value in zip(ranks, values, strict=True)}


def connect() -> Store:
    """The store of the process group, over a new connection where it is a TCPStore."""
    store = c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        # TCPStore would keep trying where nobody listens any more.
        socket.create_connection((store.host, store.port), PATIENCE).close()
        patience = timedelta(seconds=PATIENCE)
        store = TCPStore(store.host, store.port, is_master=False, timeout=patience, wait_for_workers=False)
    return PrefixStore("watchdog", store)


def call_within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises, in a thread that is abandoned with a TimeoutError if it takes longer.

    The store's own timeout does not cover a host that vanished without closing its connections.
    """
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="watchdog's store", daemon=True).start()
    return future.result(seconds)


def describe(
    rank: int,
    world: int,
    mine: Post,
    heard: Mapping[int, Heard] | None,  # of the other ranks; None: there are none, or no process group
    *,
    silence: float,  # seconds after which a post that does not change is a silent rank's
    lost: str = "",  # why the store cannot be reached
) -> str:
    """One sentence: where this rank is stuck, and which ranks it waits for, are silent, or wait for it."""
    stalled = f"rank {rank} has made no progress for {mine.idle:.0f} s in {mine.where}"
    waited = f"rank {rank} has waited {mine.idle:.0f} s in {mine.where}"
    if heard is None:
        return stalled
    here = (mine.round, mine.order)
    missing = {
        other: "which was never heard of" for other in range(world) if other != rank and not (lost and not heard)
    }
    present: dict[int, Post] = {}
    for other, entry in heard.items():
        post, at = entry.post, f"in {entry.post.where} (host {entry.post.host})"
        del missing[other]
        if post.state == "left" and (post.round, post.order) <= here:
            missing[other] = f"which left {at}"
        elif post.state == "at work" and entry.unchanged > silence:
            missing[other] = f"last heard of {entry.ago:.0f} s ago {at}"
        else:
            present[other] = post

    # Of those present, name only the hindmost, by phase or else by beats: the ranks between wait for it as well.
    first = min([(post.round, post.order) for post in present.values()], default=here)
    fewest = min([post.beats for post in present.values() if (post.round, post.order) == here], default=mine.beats)
    for other, post in present.items():
        progress = f"last progress {post.idle + heard[other].ago:.0f} s ago in {post.where} (host {post.host})"
        if (post.round, post.order) == first < here:
            missing[other] = progress
        elif (post.round, post.order) == first == here and post.beats == fewest < mine.beats:
            missing[other] = f"{mine.beats - fewest} beats behind, {progress}"

    ahead = [f"rank {other} in {post.where}" for other, post in present.items() if (post.round, post.order) > here]
    if missing:
        text = f"{waited} for {listed([f'rank {other}, {missing[other]}' for other in sorted(missing)], '; ')}"
    elif lost:
        text = waited
    else:
        text = f"{stalled}, and is behind {listed(ahead, ', ')}" if ahead else f"{stalled}, where all {world} ranks are"
    return f"{text}; the store cannot be reached ({lost}): rank 0, which holds it, is gone" if lost else text


def listed(items: list[str], comma: str) -> str:
    """The items, or the first NAMED of them and how many more there are."""
    more = len(items) - NAMED
    return comma.join(items) if more <= 0 else f"{comma.join(items[:NAMED])}{comma}and {more} more"
