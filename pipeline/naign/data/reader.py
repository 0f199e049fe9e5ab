"""Samples of a data set's shards by number: fetched by ranges of bytes, checked page by page, decoded."""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, pairwise, starmap
from typing import Any, NamedTuple

from naign.data.dataset import DataConfig, parse_resize
from naign.data.decode import Array
from naign.data.format.manifest import INDEX, Manifest, Shard, check_size
from naign.data.format.pages import Table, parse_table, table_name
from naign.data.format.webdataset import NO_TAR, samples
from naign.data.order import BLOCK, Order, Piece, count_lanes
from naign.data.sample import Numbers, decode
from naign.errors import InputError
from naign.storage.base import Store
from naign.storage.prefetch import PARALLEL, in_order
from naign.storage.store import open_store

REQUEST = 8 << 20  # bytes asked for at once, about: samples may be larger than the mean of their shard
REREADS = 3  # how often bytes whose hash is wrong are read again
TABLES = 16  # page tables kept, beside those of lanes: each is about a thousandth of its shard
BLOCKS_AHEAD = 16  # requests ahead with more than one lane: they are short, and each waits for an answer of the store

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


class DataSet:
    """The data set at data.path. InputError where it is missing, or its images do not become those of the settings."""

    def __init__(self, config: DataConfig) -> None:
        place = config.index or config.path
        self.config = config
        self.index = f"{place}/{INDEX}"
        self.manifest = Manifest.load(place)
        self.shape = parse_resize(config).shape(self.manifest.shape, self.manifest.name)  # of one row

    def reader(self, split: str) -> "Reader":
        return Reader(self.config, self.manifest, split)

    def order(self, seed: int, round_size: int) -> Order:
        """Which images of data.split rounds of so many take."""
        return Order(
            sizes=self.manifest.split(self.config.split).sizes,
            seed=seed,
            round_size=round_size,
            lanes=count_lanes(self.config.shuffle, dealt=self.manifest.dealt),
        )


class Reader:
    """The samples of one split of a data set."""

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        split: str,
    ) -> None:
        self.store = open_store(config.path)
        self._table_store = self.store
        if config.index:
            self._table_store = open_store(config.index)
        self.shards = manifest.split(split).shards
        self._manifest = manifest
        self._skip_broken = config.broken == "skip"
        self._resize = parse_resize(config)
        lanes = count_lanes(config.shuffle, dealt=manifest.dealt)
        self._width = PARALLEL * max(1, config.workers)  # requests ahead
        if lanes > 1:
            self._width += BLOCKS_AHEAD
        self._table = lru_cache(TABLES + 2 * lanes)(self._read_table)
        self._locks = defaultdict[int, threading.Lock](threading.Lock)  # by shard

    def raw(self, wanted: Iterable[Piece]) -> Generator[Raw]:
        """The stored samples of the pieces, which may be without end, in order, fetched ahead in bounded memory. Raises
        InputError for a shard that is damaged or not as the manifest says, when its turn comes.
        """
        loads = (partial(self._fetch, piece) for piece in self._cut(wanted))
        with closing(in_order(loads, self._width)) as loaded:
            yield from chain.from_iterable(starmap(self._samples, loaded))

    def row(self, raw: Raw, drawn: Numbers | None = None) -> Row:
        """The sample decoded; `drawn`: see sample.decode. Raises InputError.

        With data.broken=skip the shard's next readable sample, or after its last one the first, replaces a broken one.
        """
        try:
            return self._decode(raw, drawn)
        except InputError as error:
            if not self._skip_broken:
                raise
            problem = str(error)
        shard = self.shards[raw.piece.shard]
        for step in range(1, shard.samples):
            number = (raw.number + step) % shard.samples
            with suppress(InputError):
                piece = replace(raw.piece, first=number, last=number + 1)
                (other,) = self.raw([piece])
                return self._decode(other, drawn)._replace(broken=problem)
        raise InputError(f"{self.store.url(shard.name)}: none of its {shard.samples} samples can be decoded: {_REMEDY}")

    def _decode(self, raw: Raw, drawn: Numbers | None) -> Row:
        array, label = decode(
            raw.sample,
            self._manifest,
            self.store.url(self.shards[raw.piece.shard].name),
            self._resize,
            drawn,
        )
        return Row(array, label, raw.sample["__key__"], raw.piece.epoch)

    def _cut(self, wanted: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces, cut where they are larger than REQUEST, at ends of pages unless these are large, too."""
        for piece in wanted:
            shard = self.shards[piece.shard]
            most = max(1, REQUEST * shard.samples // shard.bytes)
            if most > BLOCK:
                most -= most % BLOCK
            for start in range(piece.first // most * most, piece.last, most):
                first = max(piece.first, start)
                last = min(piece.last, start + most)
                yield replace(piece, first=first, last=last)

    def _fetch(self, piece: Piece) -> tuple[Piece, Table, bytes]:
        """A piece, the rows of the page table of the pages that hold it and of the one after them, and their bytes."""
        shard = self.shards[piece.shard]
        with self._locks[piece.shard]:  # asked for once though several threads want it
            table = self._table(shard)
        low = int(table["sample"].searchsorted(piece.first, "right")) - 1
        high = int(table["sample"].searchsorted(piece.last))
        pages = table[low : high + 1]
        bounds = pages["byte"].tolist()
        digests = pages["sha256"][:-1].tolist()
        data = _read_sound(
            self.store,
            shard.name,
            bounds,
            digests,
        )
        return piece, pages, data

    def _read_table(self, shard: Shard) -> Table:
        check_size(self.store, shard)
        name = table_name(shard.name)
        data = _read_sound(self._table_store, name, [0, None], [bytes.fromhex(shard.pages)])
        try:
            return parse_table(data, samples=shard.samples, size=shard.bytes)
        except ValueError as error:
            raise InputError(f"{self._table_store.url(name)}: {error}: {_REMEDY}") from None

    def _samples(
        self,
        piece: Piece,
        pages: Table,
        data: bytes,
    ) -> Iterator[Raw]:
        """The samples of a piece from the rows and bytes of its pages."""
        name = self.shards[piece.shard].name
        number = int(pages["sample"][0])
        try:
            for sample in samples(data):
                if piece.first <= number < piece.last:
                    yield Raw(piece, number, sample)
                number += 1
        except NO_TAR as error:
            raise InputError(f"{self.store.url(name)}: not a tar of samples ({error}): {_REMEDY}") from None
        if number != pages["sample"][-1]:
            raise InputError(f"{self.store.url(name)}: not the samples of {table_name(name)}: {_REMEDY}")


def _read_sound(
    store: Store,
    name: str,
    bounds: list[Any],  # bytes at which pages begin and end; the last may be None: the end of the file
    digests: list[bytes],  # of each page
) -> bytes:
    """The bytes of consecutive pages of a file, read again where one has another SHA-256."""
    start = bounds[0]
    for _ in range(1 + REREADS):
        data = store.read(name, start, bounds[-1])
        view = memoryview(data)
        pages = [view[first - start : last and last - start] for first, last in pairwise(bounds)]
        if [hashlib.sha256(page).digest() for page in pages] == digests:
            return data
        store.tally.add(reread=len(data))
    problem = f"the SHA-256 of what follows byte {start} is not the one in the index"
    raise InputError(f"{store.url(name)}: {problem}, also after {REREADS} more reads: {_REMEDY}")
