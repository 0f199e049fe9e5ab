"""Samples of a data set's shards by number: fetched by ranges of bytes, checked page by page, decoded."""

import hashlib
import tarfile
import threading
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, pairwise, tee
from typing import Any, NamedTuple

from naign.data.dataset import DataConfig, parse_resize
from naign.data.decode import Array
from naign.data.format.manifest import Manifest, Shard, size_problem
from naign.data.format.pages import Table, parse_table, table_name
from naign.data.format.webdataset import samples
from naign.data.order import Piece
from naign.data.resize import Numbers
from naign.data.sample import decode
from naign.errors import InputError
from naign.storage.base import Store
from naign.storage.prefetch import PARALLEL, in_order

PART = 8 << 20  # bytes of pages asked for at once
REREADS = 3  # how often a page whose hash is wrong is read again
TABLES = 16  # page tables that are kept, or as many as there are lanes: each is about a thousandth of its shard
TABLES_AHEAD = 2  # page tables asked for before the pages of the shard before are all there
BLOCKS_AHEAD = 16  # the same, and requests, where pieces are short: each then waits for an answer of the store
JOINED = 4 << 20  # bytes of pieces that lie together and are asked for at once, though others are used in between
HELD, ROUNDS_OF_LANES = 128 << 20, 4
"""Look-ahead for merging adjacent pieces into one request: at most HELD bytes and ROUNDS_OF_LANES pieces a lane."""


class Raw(NamedTuple):
    """One sample as it is stored."""

    piece: Piece
    number: int  # in its shard
    sample: dict[str, Any]  # as WebDataset gives it


class Row(NamedTuple):
    """One sample."""

    array: Array
    label: int  # -1 where there is none
    key: str
    epoch: int
    broken: str = ""  # what was wrong with the sample in whose place this one is


class Pages(NamedTuple):
    """Consecutive pages of one shard that hold some of a piece: at most PART bytes, unless one page alone is more."""

    piece: Piece
    shard: Shard
    table: Table
    low: int  # first page
    high: int  # one past the last

    @property
    def first(self) -> int:
        """Its first byte."""
        return int(self.table["byte"][self.low])

    @property
    def size(self) -> int:
        return int(self.table["byte"][self.high]) - self.first


@dataclass(slots=True)
class _Request:
    """Pages that lie together and are read at once."""

    pages: Pages
    data: bytes | None = None  # none where one of the pages is damaged: each piece is read in its turn then


class Reader:
    """The samples of some shards of one data set. To be made in the process that uses it."""

    def __init__(
        self,
        store: Store,
        tables: Store,  # where page tables are
        manifest: Manifest,
        shards: Sequence[Shard],
        config: DataConfig,  # check, broken, and how to resize
        *,
        lanes: int,  # from how many shards pieces come in turn
        prefix: str = "",  # of keys, where each of a list of data sets has a reader
        numbers: Sequence[int] | None = None,  # of labels among those of all data sets
    ) -> None:
        self.store, self.shards, self._manifest, self._tables = store, shards, manifest, tables
        self._config, self._resize, self._prefix, self._numbers = config, parse_resize(config), prefix, numbers
        self._known = lru_cache(max(TABLES, (2 + ROUNDS_OF_LANES) * lanes))(self._read_table)
        self._one = [threading.Lock() for _ in range(4 * BLOCKS_AHEAD)]
        self._ahead = (TABLES_AHEAD, PARALLEL) if lanes == 1 else (BLOCKS_AHEAD, BLOCKS_AHEAD)
        self._held, self._most = (0, 0) if lanes == 1 else (HELD, ROUNDS_OF_LANES * lanes)

    def raw(self, wanted: Iterable[Piece]) -> Generator[Raw]:
        """The stored samples of the pieces, which may be without end, in order, fetched ahead in bounded memory. Raises
        InputError for a shard that is damaged or not as the manifest says, when its turn comes.
        """
        with closing(in_order((partial(self._cut, piece) for piece in wanted), self._ahead[0])) as cuts:
            turns, ahead = tee(self._joined(chain.from_iterable(cuts)))
            loads = (partial(self._load, request) for pages, request in ahead if pages.low == request.pages.low)
            with closing(in_order(loads, self._ahead[1])) as loaded:
                for pages, request in turns:
                    if pages.low == request.pages.low:
                        next(loaded)
                    yield from self._samples(pages, request)
                    del request  # the last piece of a request frees its bytes
                next(loaded, None)  # raises what ended the turns

    def row(self, raw: Raw, into: Array | None = None, drawn: Numbers | None = None) -> Row:
        """The sample decoded, in `into` (*shape) if that saves a copy; `drawn`: see sample.draws. Raises InputError."""
        try:
            return self._decoded(raw, into, drawn)
        except InputError as error:
            if self._config.broken != "skip":
                raise
            problem = str(error)
        shard = self.shards[raw.piece.shard]
        for step in range(1, shard.samples):  # the next readable sample; after the shard's last comes its first
            other = (raw.number + step) % shard.samples
            with suppress(InputError):
                (next_one,) = self.raw([replace(raw.piece, first=other, last=other + 1)])
                return self._decoded(next_one, None, drawn)._replace(broken=problem)
        raise InputError(f"{self.store.url(shard.name)}: none of its {shard.samples} samples can be decoded: {_REMEDY}")

    def _decoded(self, raw: Raw, into: Array | None, drawn: Numbers | None) -> Row:
        where = self.store.url(self.shards[raw.piece.shard].name)
        array, label = decode(raw.sample, self._manifest, where, into, self._resize, drawn)
        if self._numbers is not None and label >= 0:
            label = self._numbers[label] if label < len(self._numbers) else -1  # a number without a name
        return Row(array, label, self._prefix + raw.sample["__key__"], raw.piece.epoch)

    def _cut(self, piece: Piece) -> list[Pages]:
        shard, pages = self.shards[piece.shard], []
        with self._one[hash(shard.name) % len(self._one)]:  # asked for once though several threads want it
            table = self._known(shard)
        starts, edges = table["sample"], table["byte"]
        first, last = (self._manifest.place(shard.name, number) for number in (piece.first, piece.last - 1))
        low = int(starts.searchsorted(first, "right")) - 1
        end = int(starts.searchsorted(last + 1))
        while low < end:
            high = max(low + 1, min(end, int(edges.searchsorted(edges[low] + PART, "right")) - 1))
            pages.append(Pages(piece, shard, table, low, high))
            low = high
        return pages

    def _joined(self, pages: Iterable[Pages]) -> Iterator[tuple[Pages, _Request]]:
        """Pages in order, each with the request that reads it. What follows them in their shard and comes soon, after
        some of other lanes, is read with them: a store takes longer for a request than for the bytes of a block.
        """
        soon, held = list[tuple[Pages, _Request]](), 0
        ends = dict[tuple[int, int], _Request]()  # by shard and the page behind it
        failure = None
        try:
            for some in pages:
                request = ends.pop((some.piece.shard, some.low), None)
                if request and request.pages.size + some.size <= JOINED:
                    request.pages = request.pages._replace(high=some.high)
                else:
                    request = _Request(some)
                ends[some.piece.shard, some.high] = request
                soon.append((some, request))
                held += some.size
                if held >= self._held or len(soon) >= self._most:
                    yield from soon
                    soon, held, ends = [], 0, {}
        except Exception as error:  # of a piece to come: those before it are sound
            failure = error
        yield from soon
        if failure:
            raise failure

    def _load(self, request: _Request) -> None:
        with suppress(InputError):
            request.data = self._fetch(request.pages)

    def _read_table(self, shard: Shard) -> Table:
        if problem := size_problem(self.store, shard):
            raise InputError(problem)
        name, problem = table_name(shard.name), "its SHA-256 is not the one in index.json"
        data = self._sound(self._tables, name, self._tables.read(name), bytes.fromhex(shard.pages), problem)
        try:
            left_out = self._manifest.without.get(shard.name, ())
            return parse_table(data, samples=shard.samples + len(left_out), size=shard.bytes)
        except ValueError as error:
            raise InputError(f"{self._tables.url(name)}: {error}: {_REMEDY}") from None

    def _fetch(self, pages: Pages) -> bytes:
        """The bytes of pages; those whose hash is wrong are read again."""
        name, rows = pages.shard.name, pages.table[pages.low : pages.high + 1].tolist()
        start, table = rows[0][1], table_name(name)
        data = self.store.read(name, start, rows[-1][1])
        for (sample, first, digest), (end, last, _) in pairwise(rows if self._config.check else ()):
            there = memoryview(data)[first - start : last - start]
            span = f"bytes {first} to {last} (samples {sample} to {end - 1})"
            problem = f"the SHA-256 of {span} is not the one in {table}"
            sound = self._sound(self.store, name, there, digest, problem, first, last)
            if sound is not there:
                data = data[: first - start] + sound + data[last - start :]
        return data

    def _sound(
        self, store: Store, name: str, data: bytes | memoryview, digest: bytes, problem: str, *span: int
    ) -> bytes | memoryview:
        """Bytes [first, last) of a file, the `span`, read again where `data` do not have that hash; none: all of it."""
        for attempt in range(1 + REREADS):
            if attempt:
                self.store.tally.add(reread=len(data))
                data = store.read(name, *span, fresh=True)
            if hashlib.sha256(data).digest() == digest:
                return data
        raise InputError(f"{store.url(name)}: {problem}, also after {REREADS} more reads: {_REMEDY}")

    def _samples(self, pages: Pages, request: _Request) -> Iterator[Raw]:
        """The samples of a piece's pages that a request has read."""
        start = pages.first - request.pages.first
        data = self._fetch(pages) if request.data is None else request.data[start : start + pages.size]
        where, table, piece = self.store.url(pages.shard.name), table_name(pages.shard.name), pages.piece
        first, last = (int(pages.table["sample"][page]) for page in (pages.low, pages.high))
        left_out, at = self._manifest.without.get(pages.shard.name, ()), first - 1
        try:
            for at, sample in enumerate(samples(data), first):
                before = bisect_left(left_out, at)
                if piece.first <= at - before < piece.last and left_out[before : before + 1] != [at]:
                    yield Raw(piece, at - before, sample)
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{where}: no tar of samples ({error}): {_REMEDY}") from None
        if at + 1 != last:
            raise InputError(f"{where}: {at + 1 - first} samples where {table} has {last - first}: {_REMEDY}")


_REMEDY = "copy it again, or repack the data set"
