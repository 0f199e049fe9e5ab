"""Samples of a data set's shards by number: fetched by ranges of bytes, checked page by page, decoded."""

import hashlib
import tarfile
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise, tee
from typing import Any, NamedTuple

from naign.data.cache import open_cached
from naign.data.dataset import DataConfig, parse_resize
from naign.data.decode import Array
from naign.data.format.manifest import INDEX, Manifest, Shard, size_problem
from naign.data.format.pages import Table, parse_table, table_name
from naign.data.format.webdataset import samples
from naign.data.order import BLOCK, Piece, count_lanes
from naign.data.resize import Numbers
from naign.data.sample import decode
from naign.errors import InputError, require
from naign.storage.base import Store
from naign.storage.prefetch import PARALLEL, in_order

REQUEST = 8 << 20  # bytes asked for at once, about: samples may be larger than the mean of their shard
REREADS = 3  # how often bytes whose hash is wrong are read again
TABLES = 16  # page tables kept, beside those of lanes: each is about a thousandth of its shard
BLOCKS_AHEAD = 16  # requests ahead with more than one lane: they are short, and each waits for an answer of the store
JOINED = 4 << 20  # bytes of pieces that lie together and are asked for at once, though others are used in between
HELD = 128 << 20  # bytes of pieces ahead among which those that lie together are looked for,
TURNS = 4  # and of how many turns of all lanes

_REMEDY = "copy it again, or repack the data set"


class Raw(NamedTuple):
    """One sample as it is stored."""

    piece: Piece
    number: int  # in its shard
    sample: dict[str, Any]  # as WebDataset gives it


class Row(NamedTuple):
    """One decoded sample."""

    array: Array
    label: int  # -1 where there is none
    key: str
    epoch: int
    broken: str = ""  # what was wrong with the sample that this one replaces


@dataclass(slots=True)
class Request:
    """A piece that is read at once, and its bytes."""

    piece: Piece
    data: bytes | None = None  # None if a page failed its hash: the pieces within are then read one by one


class Reader:
    """The samples of one split of a data set."""

    def __init__(self, config: DataConfig, manifest: Manifest, split: str) -> None:
        self.key_prefix = ""  # of one of several data sets
        self.label_numbers: dict[int, int] | None = None  # of its labels among those of all data sets
        self.store = open_cached(config.path, config, manifest)
        self._table_store = self.store
        if config.index:
            self._table_store = open_cached(config.index, config, manifest)
        self.shards = manifest.split(split).shards
        self._manifest = manifest
        self._skip_broken = config.broken == "skip"
        self._resize = parse_resize(config)
        self._lanes = count_lanes(config.shuffle, dealt=manifest.dealt)
        self._width = PARALLEL * max(1, config.workers)  # requests ahead
        if self._lanes > 1:
            self._width += BLOCKS_AHEAD
        self._table = lru_cache(TABLES + (2 + TURNS) * self._lanes)(self._read_table)
        self._locks = defaultdict[int, threading.Lock](threading.Lock)  # by shard

    def raw(self, wanted: Iterable[Piece]) -> Generator[Raw]:
        """The stored samples of the pieces, which may be without end, in order, fetched ahead in bounded memory. Raises
        InputError for a shard that is damaged or not as the manifest says, when its turn comes.
        """
        turns, ahead = tee(self._requests(wanted))
        loads = (partial(self._load, request) for piece, request in ahead if piece.first == request.piece.first)
        with closing(in_order(loads, self._width)) as loaded:
            for piece, request in turns:
                if piece.first == request.piece.first:
                    next(loaded)
                yield from self._samples(piece, request)
                del request  # the last piece of a request frees its bytes

    def row(self, raw: Raw, into: Array | None = None, drawn: Numbers | None = None) -> Row:
        """The sample decoded, in `into` (*shape) if that saves a copy; `drawn`: see sample.decode. Raises InputError.

        With data.broken=skip the shard's next readable sample, or after its last one the first, replaces a broken one.
        """
        try:
            return self._decode(raw, into, drawn)
        except InputError as error:
            if not self._skip_broken:
                raise
            problem = str(error)
        shard = self.shards[raw.piece.shard]
        for step in range(1, shard.samples):
            number = (raw.number + step) % shard.samples
            with suppress(InputError):
                (other,) = self.raw([replace(raw.piece, first=number, last=number + 1)])
                return self._decode(other, None, drawn)._replace(broken=problem)
        raise InputError(f"{self.store.url(shard.name)}: none of its {shard.samples} samples can be decoded: {_REMEDY}")

    def _decode(self, raw: Raw, into: Array | None, drawn: Numbers | None) -> Row:
        url = self.store.url(self.shards[raw.piece.shard].name)
        array, label = decode(raw.sample, self._manifest, url, into, self._resize, drawn)
        if self.label_numbers is not None:
            label = self.label_numbers.get(label, -1)
        return Row(array, label, self.key_prefix + raw.sample["__key__"], raw.piece.epoch)

    def _requests(self, wanted: Iterable[Piece]) -> Iterator[tuple[Piece, Request]]:
        """Pieces of at most about REQUEST bytes, in order, each with the request that reads it.

        What follows a piece in its shard and comes soon, after some of other lanes, is read with it: a store takes
        longer for a request than for the bytes of a block.
        """
        soon = list[tuple[Piece, Request]]()
        latest = dict[tuple[int, int], Request]()  # by shard, and the first sample behind it
        held = 0
        for piece in self._cut(wanted):
            size = self._size(piece)
            request = latest.pop((piece.shard, piece.first), None)
            if request and self._size(request.piece) + size <= JOINED:
                request.piece = replace(request.piece, last=piece.last)
            else:
                request = Request(piece)
            latest[piece.shard, piece.last] = request
            soon.append((piece, request))
            held += size
            if self._lanes == 1 or held >= HELD or len(soon) >= TURNS * self._lanes:
                yield from soon
                soon.clear()
                latest.clear()
                held = 0
        yield from soon

    def _cut(self, wanted: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces, cut where they are larger than REQUEST, at ends of pages unless these are large, too."""
        for piece in wanted:
            shard = self.shards[piece.shard]
            most = max(1, REQUEST * shard.samples // shard.bytes)
            if most > BLOCK:
                most -= most % BLOCK
            for start in range(piece.first // most * most, piece.last, most):
                yield replace(piece, first=max(piece.first, start), last=min(piece.last, start + most))

    def _size(self, piece: Piece) -> int:
        """Bytes of a piece, from the mean of its shard."""
        shard = self.shards[piece.shard]
        return (piece.last - piece.first) * shard.bytes // shard.samples

    def _load(self, request: Request) -> None:
        with suppress(InputError):
            request.data = self._fetch(request.piece)

    def _fetch(self, piece: Piece) -> bytes:
        """The bytes of the pages with a piece."""
        name = self.shards[piece.shard].name
        pages = self._pages(piece).tolist()
        start = pages[0][1]

        def find_problem(data: bytes) -> str:
            for (_, first, digest), (_, last, _) in pairwise(pages):
                page = memoryview(data)[first - start : last - start]
                if hashlib.sha256(page).digest() != digest:
                    return f"the SHA-256 of bytes {first} to {last} is not the one in {table_name(name)}"
            return ""

        return _read_sound(self.store, name, start, pages[-1][1], find_problem)

    def _pages(self, piece: Piece) -> Table:
        """The rows of the page table of the pages that hold a piece, and the one after them."""
        shard = self.shards[piece.shard]
        with self._locks[piece.shard]:  # asked for once though several threads want it
            table = self._table(shard)
        first = self._manifest.place(shard.name, piece.first)
        last = self._manifest.place(shard.name, piece.last - 1)
        low = int(table["sample"].searchsorted(first, "right")) - 1
        high = int(table["sample"].searchsorted(last, "right"))
        return table[low : high + 1]

    def _read_table(self, shard: Shard) -> Table:
        problem = size_problem(self.store, shard)
        require((not problem, problem))
        name = table_name(shard.name)

        def find_problem(data: bytes) -> str:
            if hashlib.sha256(data).hexdigest() == shard.pages:
                return ""
            return f"its SHA-256 is not the one in {INDEX}"

        data = _read_sound(self._table_store, name, 0, None, find_problem)
        left_out = self._manifest.without.get(shard.name, ())
        try:
            return parse_table(data, samples=shard.samples + len(left_out), size=shard.bytes)
        except ValueError as error:
            raise InputError(f"{self._table_store.url(name)}: {error}: {_REMEDY}") from None

    def _samples(self, piece: Piece, request: Request) -> Iterator[Raw]:
        """The samples of a piece from what a request has read."""
        name = self.shards[piece.shard].name
        pages = self._pages(piece)
        if request.data is None:
            data = self._fetch(piece)
        else:
            start = self._pages(request.piece)["byte"][0]
            data = request.data[pages["byte"][0] - start : pages["byte"][-1] - start]
        left_out = self._manifest.without.get(name, ())
        place = int(pages["sample"][0])  # in the tar
        number = place - bisect_left(left_out, place)
        try:
            for sample in samples(data):
                if place not in left_out:
                    if piece.first <= number < piece.last:
                        yield Raw(piece, number, sample)
                    number += 1
                place += 1
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{self.store.url(name)}: not a tar of samples ({error}): {_REMEDY}") from None
        if place != pages["sample"][-1]:
            raise InputError(f"{self.store.url(name)}: not the samples of {table_name(name)}: {_REMEDY}")


def _read_sound(store: Store, name: str, first: int, last: int | None, find_problem: Callable[[bytes], str]) -> bytes:
    """Bytes [first, last) of a file, None: to its end; read again if there is a problem with them."""
    for attempt in range(1 + REREADS):
        data = store.read(name, first, last, fresh=attempt > 0)
        problem = find_problem(data)
        if not problem:
            return data
        store.tally.add(reread=len(data))
    raise InputError(f"{store.url(name)}: {problem}, also after {REREADS} more reads: {_REMEDY}")
