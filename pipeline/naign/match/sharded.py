"""An index of rows that lie on many ranks: a FAISS index on each, and one order of the answers for all.

    index = ShardedIndex(784)
    index.add(rows, first_id=rank * len(rows))  # on every rank, with its own rows
    distances, ids = index.search(queries, k=5)
    index.save("s3://bucket/index")
    index = ShardedIndex.load("s3://bucket/index")  # on any number of ranks

With the factory `Flat` the answer is that of one rank that has all rows, bit for bit. With another, FAISS proposes rows
by an index of each rank's own, and these are measured exactly: near ones that no index proposes are missing.
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from operator import index as whole
from os import fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from naign.errors import InputError, one_line, require
from naign.match.exact import load_faiss
from naign.match.exchange import ranks_of
from naign.match.index import (
    Span,
    are_rows,
    check_apart,
    check_finite,
    deliver_answers,
    described,
    search_block,
)
from naign.match.scan import FETCH, Scan
from naign.philox import MAX_ID
from naign.storage.base import Store
from naign.storage.store import check_writable, open_store

MANIFEST = "sharded-index.json"
FORMAT = 1
ROWS = 1 << 16
"""Of a block."""
MEMORY = 2**28
ANSWER = 100
"""Bytes that a candidate of an answer takes while it is searched, about."""
PROBE = 256
"""Queries of a rank that the recall is measured on."""


@dataclass(slots=True)
class Part:
    """Rows in FAISS's indexes, and their ids."""

    flat: Any
    """IndexFlatL2, which holds the rows."""
    fast: Any
    """The index of another factory, over the same rows; None for `Flat`."""
    spans: list[Span] = field(default_factory=list)

    @property
    def rows(self) -> Tensor:
        """(n, d) float32: not a copy, and only until more are added."""
        count = self.flat.ntotal
        if not count:
            return torch.empty(0, self.flat.d)
        values = load_faiss().rev_swig_ptr(self.flat.get_xb(), count * self.flat.d)
        return torch.from_numpy(values).view(count, self.flat.d)

    @property
    def ids(self) -> Tensor:
        """(n,) int64."""
        parts = [torch.arange(span.first, span.first + span.rows) for span in self.spans]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def add(self, rows: Tensor) -> None:
        """Add rows to the indexes. The first train `fast`."""
        values = rows.detach().cpu().resolve_neg().contiguous().numpy()
        if self.fast is not None and len(rows):
            if not self.fast.is_trained:
                self.fast.train(values)
            self.fast.add(values)
        self.flat.add(values)

    def forget(self) -> None:
        """Remove rows that no span has."""
        known = sum(span.rows for span in self.spans)
        self.flat.remove_ids(load_faiss().IDSelectorRange(known, self.flat.ntotal))
        if self.fast is not None:
            self.fast.reset()
            if known:
                self.fast.add(self.rows.numpy())


class ShardedIndex:
    """Rows of all ranks, searched for the nearest by (float64 squared L2 distance, id).

    All methods are collective, the constructor, too. What one rank raises for its arguments, files or FAISS's indexes,
    every rank raises. A rank whose memory is full in a search is waited for until the process group's timeout.
    """

    def __init__(
        self,
        dims: int,
        *,
        factory: str = "Flat",
        group: dist.ProcessGroup | None = None,
        memory: int = MEMORY,
    ) -> None:
        """
        Args:
            dims: values of a row.
            factory: string of FAISS's `index_factory`. `Flat` is exact; others (`IVF4096,Flat`, `HNSW32`) propose, as
                `tune` says, and hold the rows a second time. What must be trained is, by the first rows that a rank
                adds.
            group: the default group, or this process alone where there is none.
            memory: bytes that a rank needs at once for queries of all ranks and their answers, about.

        Raises:
            ValueError: for a factory that FAISS does not know, or where ranks pass different arguments.
        """
        self._ranks = ranks_of(group)

        def checked() -> tuple[int, str, int]:
            if whole(memory) < 1:
                raise ValueError(f"ShardedIndex: memory is {memory}: it must be at least 1")
            _new_part(whole(dims), factory)
            return whole(dims), factory, whole(memory)

        given = self._ranks.each(checked)
        for rank, other in enumerate(given):
            if other != given[0]:
                raise ValueError(
                    "ShardedIndex: dims, factory and memory must be the same on all ranks: "
                    f"rank {rank} has {other}, rank 0 {given[0]}"
                )
        self.dims, self.factory, self.memory = given[0]
        self._parts = [_new_part(self.dims, factory)]
        self._spans: list[Span] = []  # of all ranks

    def __len__(self) -> int:
        """Rows of all ranks."""
        return sum(span.rows for span in self._spans)

    def add(self, rows: Tensor, first_id: int) -> None:
        """Add this rank's rows (n, dims) float32, n >= 0: row i has the id first_id + i.

        Raises:
            ValueError: and nothing is added, if a rank's rows have another width or type, or hold NaN or infinity, if
                ids are taken, or if FAISS cannot be trained by so few rows.
        """
        ranks = self._ranks
        added = ranks.each(lambda: self._checked(rows, first_id))
        spans = [span for span in added if span.rows]
        check_apart([*self._spans, *spans])
        part = self._parts[-1]
        try:
            self._by_faiss(lambda: part.add(rows))
        except Exception:
            part.forget()
            raise
        if len(rows):
            part.spans.append(added[ranks.rank])
        self._spans += spans

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k nearest rows of each query.

        Args:
            queries: (q, dims) float32, any q >= 0 on each rank.
            k: how many, at least 1, the same on every rank.

        Returns:
            (q, k) float64 squared L2 distances, ascending, infinite where fewer rows are there or proposed; and (q, k)
            int64 ids, -1 there; the smaller id first where distances are equal.

        Raises:
            ValueError: if a rank's queries have another width or type, or hold NaN or infinity.
            RuntimeError: if a rank dies, or is silent for longer than the process group's timeout.
        """
        return self._search(queries, k, exact=self.factory == "Flat")

    def tune(self, parameters: str) -> None:
        """Let searches take other parameters of FAISS: more `nprobe=16`, or `efSearch=128`, find more of the nearest.

        Raises:
            ValueError: for parameters that the factory does not have. `Flat` has none.
        """

        def tuned() -> None:
            for part in self._parts:
                load_faiss().ParameterSpace().set_index_parameters(part.fast or part.flat, parameters)

        self._by_faiss(tuned)

    def recall(self, queries: Tensor, k: int = 1) -> float:
        """The share of the k nearest rows that `search` finds, of the first PROBE queries of each rank."""
        probe = queries[:PROBE] if are_rows(queries) else queries
        _, found = self.search(probe, k)
        _, wanted = self._search(probe, k, exact=True)
        hits = (wanted[:, :, None] == found[:, None]).any(2)[wanted >= 0]
        counts = self._ranks.collect((int(hits.sum()), len(hits)))
        return sum(hit for hit, _ in counts) / max(1, sum(total for _, total in counts))

    def save(self, place: str | Path) -> None:
        """Write a file of each rank's rows, and sharded-index.json last, to a folder or a bucket. An index that was
        there is replaced, and its files are deleted. Takes twice the memory of a rank's rows.

        Raises:
            InputError: and nothing is written, where a rank cannot write there.
        """
        ranks = self._ranks
        ranks.each(lambda: check_writable(open_store(fspath(place)), f"{place}, from rank {ranks.rank},"))
        store = open_store(fspath(place))
        records = ranks.each(lambda: [_write(store, part) for part in self._parts if part.spans])
        parts = [record for each in records for record in each]
        parts.sort(key=lambda record: record["spans"])
        manifest = {"format": FORMAT, "dims": self.dims, "factory": self.factory, "parts": parts}

        def finish() -> None:
            for name in _files(manifest):
                unshared = f"rank 0 does not find {store.url(name)}, which another rank has written"
                require((store.exists(name), f"{unshared}: save to one place that all ranks share"))
            old = set[str]()
            with suppress(InputError):  # there is none, or it is damaged
                old = _files(_load_manifest(store))
            store.put(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            for name in old - _files(manifest):
                store.delete(name)

        ranks.each(finish if ranks.rank == 0 else lambda: None)

    @classmethod
    def load(
        cls,
        place: str | Path,
        *,
        group: dist.ProcessGroup | None = None,
        memory: int = MEMORY,
    ) -> "ShardedIndex":
        """The index that was saved there, by any number of ranks: its files are shared out, whole, in their order.

        FAISS reads files that were made to harm it without care: load only what you trust.

        Raises:
            InputError: where there is no index, or a file of it is missing, damaged or of another index or FAISS.
        """
        ranks = ranks_of(group)
        manifest = ranks.each(lambda: _load_manifest(open_store(fspath(place))) if ranks.rank == 0 else {})[0]
        index = cls(
            manifest["dims"],
            factory=manifest["factory"],
            group=group,
            memory=memory,
        )
        records = manifest["parts"]
        first = len(records) * ranks.rank // ranks.world
        last = len(records) * (ranks.rank + 1) // ranks.world

        def read() -> list[Span]:
            store = open_store(fspath(place))
            parts = [_read(store, record, index) for record in records[first:last]]
            index._parts = parts or index._parts
            return [span for part in parts for span in part.spans]

        for spans in ranks.each(read):
            index._spans += spans
        return index

    def _checked(self, rows: Tensor, first_id: int) -> Span:
        """The ids of rows that are added. Raises ValueError."""
        rank = self._ranks.rank
        self._check_rows(rows, "rows")
        if not 0 <= whole(first_id) <= MAX_ID - len(rows):
            raise ValueError(f"ShardedIndex: the ids of rank {rank} leave [0, 2**62): they start at {first_id}")
        return Span(whole(first_id), len(rows), rank)

    def _check_rows(self, rows: Tensor, what: str) -> None:
        rank = self._ranks.rank
        if not are_rows(rows) or rows.shape[1] != self.dims:
            raise ValueError(
                f"ShardedIndex: the {what} of rank {rank} must be a float32 torch tensor (n, {self.dims}), "
                f"not {described(rows)}"
            )
        check_finite(rows, f"the {what} of rank {rank}", first_row=0)

    def _by_faiss(self, work: Callable[[], None]) -> None:
        """Work of FAISS on every rank; its errors are ValueErrors."""

        def named() -> None:
            load_faiss().omp_set_num_threads(torch.get_num_threads())
            try:
                work()
            except (RuntimeError, MemoryError) as error:
                raise ValueError(
                    f"ShardedIndex: {self.factory} on rank {self._ranks.rank}: {one_line(error)}"
                ) from None

        self._ranks.each(named)

    def _search(
        self,
        queries: Tensor,
        k: int,
        *,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        ranks = self._ranks
        blocks = self._blocks() if exact else []

        def checked() -> tuple[int, int, int]:
            self._check_rows(queries, "queries")
            if whole(k) < 1:
                raise ValueError(f"ShardedIndex: k is {k}: it must be at least 1")
            return len(queries), whole(k), len(blocks)

        given = ranks.each(checked)
        counts, asked, sizes = map(list, zip(*given, strict=True))
        if len(set(asked)) > 1:
            raise ValueError(f"ShardedIndex: k must be the same on all ranks, not {asked}")
        none = (torch.empty(0, self.dims), torch.empty(0, dtype=torch.int64))
        blocks += [none] * (max(sizes) - len(blocks))
        rows_of_query = 2 if exact else 2 + k + FETCH
        step = max(1, self.memory // (ranks.world * (4 * self.dims * rows_of_query + ANSWER * (k + FETCH))))
        found = []
        for low in range(0, max(1, *counts), step):
            part = queries.detach()[low : low + step]
            shares = [min(step, max(0, count - low)) for count in counts]
            scan = Scan(
                ranks.gather(part, shares),
                neighbours=k,
                method="auto",
                expected=sum(each.flat.ntotal for each in self._parts),
            )
            for number, (rows, ids) in enumerate(blocks):
                search_block(
                    scan,
                    rows.to(scan.queries.device),
                    ids,
                    ranks,
                    first=number == 0,
                )
            if not exact:
                self._by_faiss(lambda scan=scan: self._scan_proposed(scan))  # type: ignore[misc]
            found.append(deliver_answers(scan, shares, ranks))
        distances, ids = map(torch.cat, zip(*found, strict=True))
        return distances, ids

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Rows and ids of this rank."""
        blocks = list[tuple[Tensor, Tensor]]()
        for part in self._parts:
            blocks += zip(part.rows.split(ROWS), part.ids.split(ROWS), strict=True)
        return blocks

    def _scan_proposed(self, scan: Scan) -> None:
        """Measure the rows of this rank that FAISS proposes."""
        asked = scan.queries.cpu().numpy()
        device = scan.queries.device
        for part in self._parts:
            if not (part.flat.ntotal and len(asked)):
                continue
            count = min(scan.neighbours + FETCH, part.flat.ntotal)
            columns = torch.from_numpy(part.fast.search(asked, count)[1])
            rows, places = (columns >= 0).nonzero(as_tuple=True)
            chosen, columns = columns[rows, places].unique(return_inverse=True)
            near = part.rows[chosen].to(device)
            ids = part.ids[chosen].to(device)
            scan.measure(near, ids, rows.to(device), columns.to(device))
            scan.settle(near, ids)


def _new_part(dims: int, factory: str) -> Part:
    """Empty indexes. Raises ValueError for a factory that FAISS does not know."""
    if not 1 <= dims < 2**31:
        raise ValueError(f"ShardedIndex: dims is {dims}: it must be at least 1, and below 2**31")
    faiss = load_faiss()
    fast = None
    if re.search(r"HNSW[01]\b", factory.replace("_", ",")):  # FAISS would end the process
        raise ValueError(f"ShardedIndex: factory {factory!r}: HNSW needs at least 2 links")
    if factory != "Flat":
        try:
            fast = faiss.index_factory(dims, factory)
        except (RuntimeError, TypeError, MemoryError, NotImplementedError) as error:
            raise ValueError(f"ShardedIndex: factory {factory!r}: {one_line(error)}") from None
    return Part(faiss.IndexFlatL2(dims), fast)


def _write(store: Store, part: Part) -> dict[str, Any]:
    """Write a part's files. Returns what the manifest says of it."""
    record: dict[str, Any] = {"spans": [[span.first, span.rows] for span in part.spans]}
    for kind, index in (("rows", part.flat), ("fast", part.fast)):
        if index is not None:
            data = load_faiss().serialize_index(index).tobytes()
            record[kind] = hashlib.sha256(data).hexdigest()
            store.put(_name(record, kind), data)
    return record


def _name(record: dict[str, Any], kind: str) -> str:
    """The name of a part's file. Raises ValueError where the record is none that `_write` made."""
    digest = bytes.fromhex(record[kind])
    return f"{record['spans'][0][0]:020d}-{digest[:6].hex()}.{kind}.faiss"


def _files(manifest: dict[str, Any]) -> set[str]:
    """The names of a saved index's files."""
    return {_name(part, kind) for part in manifest["parts"] for kind in ("rows", "fast") if kind in part}


def _load_manifest(store: Store) -> dict[str, Any]:
    """What is saved. Raises InputError where there is nothing, or what is there is no index."""
    where = store.url(MANIFEST)
    require((store.exists(MANIFEST), f"{where}: no such file: ShardedIndex.save writes one"))
    try:
        manifest: dict[str, Any] = json.loads(store.read(MANIFEST))
        require((manifest["format"] == FORMAT, f"{where}: format {manifest['format']!r}, not {FORMAT}"))
        _new_part(whole(manifest["dims"]), manifest["factory"])
        spans = []
        manifest["parts"] = list(manifest["parts"])
        for part in manifest["parts"]:
            if ("fast" in part) == (manifest["factory"] == "Flat"):
                raise ValueError("files and factory do not go together")
            _name(part, "rows")
            for first, count in part["spans"]:
                spans.append(Span(whole(first), whole(count), 0))
        check_apart(spans)
        _files(manifest)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: malformed ({type(error).__name__}: {error}): save the index again") from None
    return manifest


def _read(store: Store, record: dict[str, Any], index: ShardedIndex) -> Part:
    """A part of a saved index. Raises InputError."""
    spans = [Span(first, count, index._ranks.rank) for first, count in record["spans"]]
    found = dict[str, Any](rows=None, fast=None)
    for kind in found:
        if kind not in record:
            continue
        name = _name(record, kind)
        data = store.read(name)
        sound = hashlib.sha256(data).hexdigest() == record[kind]
        require((sound, f"{store.url(name)}: cut, damaged or of another index: save the index again"))
        try:
            found[kind] = load_faiss().deserialize_index(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            raise InputError(f"{store.url(name)}: this FAISS cannot read it: {one_line(error)}") from None
        fits = found[kind].d == index.dims and found[kind].ntotal == sum(span.rows for span in spans)
        require((fits, f"{store.url(name)}: not the rows that {MANIFEST} says: save the index again"))
    return Part(found["rows"], found["fast"], spans)
