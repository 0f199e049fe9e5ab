"""Ends a rank that makes no progress, and says where it and the other ranks are.

Every rank posts what it is doing in the process group's store, over a connection of its own, since the main thread may
hold the group's connection while it waits. Clocks of different hosts are never compared: a rank measures by its own
clock how long it has been idle, and takes another for silent if its post does not change between two readings.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Self

from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from naign.errors import FAILED, pass_on
from naign.storage.prefetch import in_background

PATIENCE = 5.0  # seconds that one exchange with the store may take
NAMED = 8  # the most ranks that one message names
Seen = tuple["Post", float, float]  # another rank's newest post, and when it was first and last read here


class Post(NamedTuple):
    """What a rank says of itself. The first three say how far it is."""

    round: int
    order: int  # of the phase among those entered in this round, from 1
    beats: int  # since the phase began
    phase: str
    idle: float  # seconds without progress when it was posted, by the poster's clock
    host: str

    def __str__(self) -> str:
        return f"{self.phase} of round {self.round}, beat {self.beats}"


class Watchdog:
    """Ends the process with exit code 1 when neither `enter` nor `beat` was called for `timeout` seconds.

    The process group's timeout must be longer, or it would fail first. The seconds `every` lie between two posts.
    All ranks must enter the same phases of a round in the same order, since that tells who is behind. A process can run
    one at a time: a thread that never releases the interpreter is ended by faulthandler, which has one timer.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        timeout: float,
        every: float = 5.0,
    ) -> None:
        self.phase = "setup"
        self.round = 0
        self._order = 0
        self._beats = 0
        self._since = time.monotonic()
        self._rank = rank
        self._world = world
        self._timeout = timeout
        self._every = min(every, timeout / 10)
        self._say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self._store: Store | None = None
        self._seen: dict[int, Seen] = {}  # of the other ranks
        self._lost = ""  # why the last exchange with the store failed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str, round: int) -> None:
        """This rank begins a phase of a round, which is progress."""
        if round != self.round:
            self._order = 0
        self._order += 1
        self.phase = phase
        self.round = round
        self._beats = 0
        self._since = time.monotonic()

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

    def _post(self) -> Post:
        idle = time.monotonic() - self._since
        return Post(
            round=self.round,
            order=self._order,
            beats=self._beats,
            phase=self.phase,
            idle=idle,
            host=socket.gethostname(),
        )

    def _watch(self) -> None:
        """Post, and end the process once there was no progress for too long. The body of the thread."""
        read_at = 0.0
        try:
            while not self._stop.is_set():
                # If this thread cannot run for so long, no Python code can: faulthandler ends the process.
                exit_after(self._timeout + self._every + 3 * PATIENCE, file=2)
                now = time.monotonic()
                idle = now - self._since
                if idle >= self._timeout:
                    self._give_up()
                    continue
                # Only ranks that wait read, and less often than they post, since each reads the posts of all.
                read = idle > 2 * self._every and now >= read_at
                if read:
                    read_at = now + max(self._every, self._timeout / 20)
                self._exchange(read=read)
                left = self._since + self._timeout - time.monotonic()
                self._stop.wait(max(0.0, min(self._every, left)))
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.close(self._devnull)

    def _give_up(self) -> None:
        """Say why and end the process, unless there is progress after all."""
        exit_after(4 * PATIENCE, file=self._devnull)  # even if `say` hangs, or a full pipe behind stderr
        since = self._since
        self._exchange(read=True)
        if self._stop.is_set() or self._since != since:
            return
        try:
            silence = min(3 * self._every + 2, self._timeout / 2)  # on a busy machine a post may come late
            text = describe(
                self._rank,
                self._world,
                self._post(),
                self._seen,
                silence=silence,
                lost=self._lost,
            )
            with suppress(Exception):  # the stacks are worth as much
                self._say(text)
                pass_on("; ".join(line.strip() for line in text.splitlines()[:2]))  # with the rank that is waited for
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            faulthandler.dump_traceback(file=2)
        finally:
            os._exit(FAILED)

    def _exchange(self, *, read: bool) -> None:
        """Post, and read the posts of all if `read`. Raises nothing and takes PATIENCE seconds at most."""
        if self._world == 1:
            return
        key = str(self._rank)
        text = json.dumps(self._post())
        others = []
        if read:
            others = [str(rank) for rank in range(self._world) if rank != self._rank]
        store = self._store
        self._store = None  # one that failed, or still hangs, is not used again
        try:
            # In a thread: the store's own timeout does not cover a host that vanished.
            swapped = in_background(lambda: swap(store, key, text, others), "watchdog's store")
            self._store, posts = swapped.result(PATIENCE)
        except Exception as error:
            self._lost = str(error).partition("\n")[0] or f"no answer in {PATIENCE:.0f} s"
            return
        self._lost = ""
        now = time.monotonic()
        for rank, value in posts.items():
            post = Post(*json.loads(value))
            first = now
            if rank in self._seen and self._seen[rank][0] == post:
                first = self._seen[rank][1]
            self._seen[rank] = (post, first, now)


def exit_after(seconds: float, *, file: int) -> None:
    """Unless called again or cancelled: write the stacks to `file` and exit with code 1, without the interpreter."""
    with suppress(RuntimeError):  # the container allows no more threads: do without
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)


def swap(
    store: Store | None,
    key: str,
    text: str,
    others: list[str],
) -> tuple[Store, dict[int, bytes]]:
    """Set this rank's post in the store, over a new connection if None. Returns the store, and the others' posts."""
    if store is None:
        group: Any = c10d._get_default_store()
        store = PrefixStore("watchdog", group.clone())
    store.set(key, text)
    if others and not store.check(others):  # reading a missing key would block
        others = [key for key in others if store.check([key])]
    posts = {}
    if others:  # in one request: a thousand ranks may ask at once
        for other, post in zip(others, store.multi_get(others), strict=True):
            posts[int(other)] = post
    return store, posts


def describe(
    rank: int,
    world: int,
    mine: Post,
    seen: Mapping[int, Seen],
    *,
    silence: float,
    lost: str = "",
) -> str:
    """Where this rank is stuck, and a line for each of the others: first those that are not there, then the hindmost.
    A rank is silent if its post did not change for `silence` seconds; `lost` is why the store cannot be reached.
    """
    head = f"rank {rank} has made no progress for {mine.idle:.0f} s in {mine}"
    if lost:
        head += f"; the store cannot be reached ({lost}): rank 0, which holds it, is gone"
    now = time.monotonic()
    rows = []  # each after what it is sorted by
    for other, (post, first, last) in seen.items():
        is_silent = last - first > silence
        mark = ""
        if is_silent:
            mark = f": SILENT for {now - first:.0f} s"
        elif post[:3] < mine[:3]:
            mark = ": BEHIND"
        idle = post.idle + now - first
        text = f"rank {other} in {post}, last progress {idle:.0f} s ago, host {post.host}{mark}"
        rows.append((not is_silent, post[:3], other, text))
    if seen or not lost:
        for other in set(range(world)) - {rank, *seen}:
            rows.append((False, (0, 0, 0), other, f"rank {other} MISSING, never heard of"))
    lines = [text for *_, text in sorted(rows)]
    if len(lines) > NAMED:
        lines[NAMED:] = [f"and {len(lines) - NAMED} more"]
    return "\n  ".join([head, *lines])
