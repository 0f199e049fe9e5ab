"""Ends a rank that makes no progress any more, and says for which ranks it waited and where those are.

Every rank posts what it is doing in the process group's store, over a connection of its own: the main thread may hold
the group's for as long as it waits there. Nobody compares clocks of two hosts: how long a rank has been idle is told by
its own clock, and that it is silent by its post not changing from one reading to the next.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Literal, Self, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from pipeline.errors import FAILED

PATIENCE = 5.0
"""Seconds that one exchange with the store may take."""

NAMED = 8
"""Ranks that one message names."""

Answer = TypeVar("Answer")


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Watchdog:
    """Ends the process with exit code 1 when neither `enter` nor `beat` was called for `timeout` seconds.

    Every rank enters the same phases of a round in the same order: who is behind is told by it. One at a time in a
    process, since the last resort, against a thread that never lets go of the interpreter, is faulthandler's one timer.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        timeout: float,  # seconds without progress; below the process group's, which would fail first
        say: Callable[[str], None] = say_on_stderr,  # takes the one message, before the stacks go to stderr
        every: float = 5.0,  # seconds from post to post; at most a tenth of timeout
    ) -> None:
        for name, value in (("timeout", timeout), ("every", every)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"the watchdog's {name} is {value} seconds: more than 0 and finite, such as 600")
        self._rank, self._timeout, self._say, self._every = rank, timeout, say, min(every, timeout / 10)
        self._place = Place(phase="setup", round=0, order=0)
        self._peers = Peers(rank, world)
        self._read_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def phase(self) -> str:
        """What this rank is doing."""
        return self._place.phase

    @property
    def round(self) -> int:
        """The round this rank is in."""
        return self._place.round

    def enter(self, phase: str, round: int) -> None:
        """This rank begins a phase of a round, which is progress."""
        before = self._place
        self._place = Place(phase=phase, round=round, order=before.order + 1 if before.round == round else 1)

    def beat(self) -> None:
        """Progress inside a phase: a step, a block. Costs two assignments and a look at the clock."""
        place = self._place
        place.beats += 1
        place.since = time.monotonic()

    def __enter__(self) -> Self:
        self._place.since = time.monotonic()
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(3 * PATIENCE)  # an exchange under way, and the farewell

    def _watch(self) -> None:
        """The thread: post, and look whether there was progress."""
        try:
            while not self._stop.is_set():
                # Not reached again for so long, this thread is kept from running: then no Python code can say why.
                end_after(self._timeout + self._every + 3 * PATIENCE, file=2)
                idle = time.monotonic() - self._place.since
                if idle >= self._timeout:
                    self._give_up()
                    continue
                # Reading is left to those who wait, and is rarer than posting: every rank reads the posts of all.
                read = idle > 2 * self._every and time.monotonic() >= self._read_at
                if read:
                    self._read_at = time.monotonic() + max(self._every, self._timeout / 20)
                self._peers.exchange(self._place.post(), read=read)
                due = self._place.since + self._timeout - time.monotonic()
                self._stop.wait(max(0.0, min(self._every, due)))
            if not self._peers.lost:
                self._peers.exchange(self._place.post("left"))
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.close(self._nowhere)

    def _give_up(self) -> None:
        """Say why and end the process, unless there is progress after all."""
        # Whatever hangs from here on, be it `say` or a full pipe behind stderr, the process ends.
        end_after(4 * PATIENCE, file=self._nowhere)
        place, since = self._place, self._place.since
        self._peers.exchange(place.post(), read=True)
        if self._stop.is_set() or self._place is not place or place.since != since:
            return
        try:
            mine, peers = place.post(), self._peers
            silence = min(3 * self._every + 2, self._timeout / 2)  # on a busy machine a post may come late
            heard = peers.heard() if peers.reachable else None
            text = describe(self._rank, peers.world, mine, heard, silence=silence, lost=peers.lost)
            with suppress(Exception):  # the stacks are worth as much
                self._say(text)
            if not peers.lost:
                peers.exchange(place.post("ended"))
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            faulthandler.dump_traceback(file=2)
        finally:
            os._exit(FAILED)


def end_after(seconds: float, *, file: int) -> None:
    """Unless told anew or cancelled, write the stacks to `file` and exit with 1, without the interpreter's help."""
    with suppress(RuntimeError):  # no more threads in this container: then without
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)


@dataclass(slots=True, kw_only=True)
class Place:
    """Where this rank is. Written by the main thread alone, without a lock."""

    phase: str
    round: int
    order: int
    """Phases entered in this round, with this one."""
    beats: int = 0
    since: float = field(default_factory=time.monotonic)
    """When there was progress, by this process's clock."""

    def post(self, state: Literal["at work", "left", "ended"] = "at work") -> "Post":
        idle = time.monotonic() - self.since
        return Post(self.phase, self.round, self.order, self.beats, idle, socket.gethostname(), state)


@dataclass(frozen=True, slots=True)
class Post:
    """What a rank says of itself."""

    phase: str
    round: int
    order: int
    beats: int
    idle: float
    """Seconds without progress when it was posted, by the clock of the rank that posts."""
    host: str
    state: Literal["at work", "left", "ended"] = "at work"
    """left: out of the watchdog's context; ended: given up by its own watchdog."""
    number: int = 0
    """Of this rank's posts."""

    @property
    def where(self) -> str:
        return f"{self.phase} of round {self.round}"


@dataclass(frozen=True, slots=True)
class Heard:
    """A rank's last post, and since when it is the last, by the clock of the rank that reads."""

    post: Post
    ago: float
    """Seconds since it was first read."""
    unchanged: float
    """Seconds from its first reading to the newest one."""


class Peers:
    """The posts of all ranks, in the store. Used by the watchdog's thread alone."""

    def __init__(self, rank: int, world: int) -> None:
        self.world = world
        self.lost = ""
        """Why the last exchange failed."""
        self._rank = rank
        self._number = 0
        self._store: Store | None = None
        self._posts: dict[int, tuple[Post, float]] = {}  # with the time of its first reading
        self._read_at = 0.0

    @property
    def reachable(self) -> bool:
        """Whether there are other ranks, in a process group."""
        return self.world > 1 and dist.is_available() and dist.is_initialized()

    def exchange(self, post: Post, *, read: bool = False) -> None:
        """Post, and read the posts of all if wished. Raises nothing and takes PATIENCE seconds at most."""
        if not self.reachable:
            return
        self._number += 1
        text = json.dumps(asdict(post) | {"number": self._number})
        store, self._store = self._store, None  # one that failed or still hangs is not asked again
        try:
            self._store, posts = within(PATIENCE, lambda: self._talk(store or connect(), text, read))
        except Exception as error:
            self.lost = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
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

    def _talk(self, store: Store, text: str, read: bool) -> tuple[Store, dict[int, Post]]:
        store.set(str(self._rank), text)
        if not read:
            return store, {}
        ranks = [rank for rank in range(self.world) if rank != self._rank]
        if not store.check([str(rank) for rank in ranks]):  # a key that is not there would be waited for
            ranks = [rank for rank in ranks if store.check([str(rank)])]
        values = store.multi_get([str(rank) for rank in ranks]) if ranks else []
        return store, {rank: Post(**json.loads(value)) for rank, value in zip(ranks, values, strict=True)}


def connect() -> Store:
    """The store of the process group, over a new connection where it is a TCPStore."""
    store = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        patience = timedelta(seconds=PATIENCE)
        # TCPStore would go on trying where nobody listens any more.
        socket.create_connection((store.host, store.port), PATIENCE).close()
        store = TCPStore(store.host, store.port, is_master=False, timeout=patience, wait_for_workers=False)
    return PrefixStore("watchdog", store)


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises, in a thread that is left behind with a TimeoutError if it takes longer.

    The store's own timeout does not cover a host that vanished without closing its connections.
    """
    answers: list[Answer] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="watchdog's store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return answers[0]


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
    holder = "the launcher of rank 0" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    gone = f"the store cannot be reached ({lost}): {holder}, which holds it, is gone" if lost else ""

    # Who is not there any more.
    suspects: dict[int, str] = {}
    there: dict[int, Post] = {}
    for other in range(world):
        if other == rank or (lost and not heard):
            continue
        if other not in heard:
            suspects[other] = f"rank {other}, which was never heard of"
            continue
        post, entry = heard[other].post, heard[other]
        at = f"in {post.where} (host {post.host})"
        if post.state == "left" and (post.round, post.order) <= here:
            suspects[other] = f"rank {other}, which left {at}"
        elif post.state == "at work" and entry.unchanged > silence:
            suspects[other] = f"rank {other}, last heard of {entry.ago:.0f} s ago {at}"
        else:
            there[other] = post

    # Who is behind, by the phase or else by the beats: only the hindmost, for whom those between wait as well.
    first = min([(post.round, post.order) for post in there.values()], default=here)
    fewest = min([post.beats for post in there.values() if (post.round, post.order) == here], default=mine.beats)
    for other, post in there.items():
        progress = f"last progress {post.idle + heard[other].ago:.0f} s ago in {post.where} (host {post.host})"
        if (post.round, post.order) == first < here:
            suspects[other] = f"rank {other}, {progress}"
        elif (post.round, post.order) == first == here and post.beats == fewest < mine.beats:
            suspects[other] = f"rank {other}, {mine.beats - fewest} beats behind, {progress}"

    ahead = [f"rank {r} in {post.where}" for r, post in there.items() if (post.round, post.order) > here]
    if suspects:
        text = f"{waited} for {listed([suspects[other] for other in sorted(suspects)], '; ')}"
    elif lost:
        text = waited
    elif ahead:
        text = f"{stalled}, and is behind {listed(ahead, ', ')}"
    else:
        text = f"{stalled}, where all {world} ranks are"
    return f"{text}; {gone}" if gone else text


def listed(items: list[str], comma: str) -> str:
    """The items, the first NAMED of them if there are more."""
    more = len(items) - NAMED
    return comma.join(items) if more <= 0 else f"{comma.join(items[:NAMED])}{comma}and {more} more"
