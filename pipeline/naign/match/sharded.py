"""An index of rows that lie on many ranks: a FAISS index on each, and one order of the answers for all.

    index = ShardedIndex(784)
    index.add(rows, first_id=rank * len(rows))  # on every rank, with its own rows
    distances, ids = index.search(queries, k=5)
    index.save("s3://bucket/index")
    index = ShardedIndex.load("s3://bucket/index")  # on any number of ranks

The answer is that of one rank that has all rows, bit for bit. With another factory than `Flat`, FAISS proposes rows by
its index, and these are measured exactly; near ones that it does not propose are missing.
"""

import hashlib
import json
from dataclasses import dataclass, field
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
from naign.storage.store import open_store

MANIFEST = "index.json"
FORMAT = 1
ROWS = 1 << 16
"""Of a block."""
MEMORY = 2**28
PROBE = 256
"""Queries that the recall is measured on."""


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
        """(n,) int64, ascending."""
        parts = [torch.arange(span.first, span.first + span.count) for span in self.spans]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


class ShardedIndex:
    """Rows of all ranks, searched for the nearest by (float64 squared L2 distance, id). All methods are collective."""

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
            factory: string of FAISS's `index_factory`. `Flat` is exact, others (`IVF4096,Flat`, `HNSW32`) propose; one
                that must be trained is, by the first rows that a rank adds.
            group: the default group, or this process alone where there is none.
            memory: bytes of queries, of all ranks, that are searched at once; a rank holds about twice that.

        Raises:
            ValueError: for a factory that FAISS does not know.
        """
        if not isinstance(dims, int) or dims < 1:
            raise ValueError(f"ShardedIndex: dims is {dims!r}: it must be at least 1")
        self.dims = dims
        self.factory = factory
        self.memory = memory
        self._ranks = ranks_of(group)
        self._parts = [self._new_part()]
        self._spans: list[Span] = []  # of all ranks

    def __len__(self) -> int:
        """Rows of all ranks."""
        return sum(span.count for span in self._spans)

    def add(self, rows: Tensor, first_id: int) -> None:
        """Add this rank's rows (n, dims) float32, n >= 0: row i has the id first_id + i.

        Raises:
            ValueError: on every rank, and nothing is added, if a rank's rows have another width or type, or hold NaN
                or infinity, if ids are taken or do not ascend, or if FAISS cannot be trained by so few rows.
        """
        ranks = self._ranks
        mine: Span | ValueError
        try:
            mine = self._checked(rows, first_id)
        except ValueError as error:
            mine = error
        spans = [span for span in ranks.collect(mine) if span.count]
        check_apart([*self._spans, *spans])
        part = self._parts[-1]
        values = rows.detach().cpu().contiguous().numpy()
        failure: ValueError | None = None
        try:
            if part.fast is not None and len(values):
                if not part.fast.is_trained:
                    part.fast.train(values)
                part.fast.add(values)
        except RuntimeError as error:
            failure = ValueError(f"ShardedIndex: {self.factory} on rank {ranks.rank}: {one_line(error)}")
        ranks.collect(failure)
        part.flat.add(values)
        part.spans += [span for span in spans if span.rank == ranks.rank]
        self._spans += spans

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k nearest rows of each query.

        Args:
            queries: (q, dims) float32, any q >= 0 on each rank.
            k: how many, at least 1.

        Returns:
            (q, k) float64 squared L2 distances, ascending, infinite where there are fewer rows; and (q, k) int64 ids,
            -1 there; the smaller id first where distances are equal.

        Raises:
            ValueError: on every rank, if a rank's queries have another width or type, or hold NaN or infinity.
            RuntimeError: if a rank dies, or is silent for longer than the process group's timeout.
        """
        return self._search(queries, k, exact=self.factory == "Flat")

    def recall(self, queries: Tensor, k: int = 1) -> float:
        """The share of the k nearest rows that `search` finds, of this rank's first PROBE queries and all others'."""
        probe = queries[:PROBE]
        _, found = self.search(probe, k)
        _, wanted = self._search(probe, k, exact=True)
        hits = (found[:, :, None] == wanted[:, None]).any(1) & (wanted >= 0)
        counts = self._ranks.collect((int(hits.sum()), int((wanted >= 0).sum())))
        return sum(hit for hit, _ in counts) / max(1, sum(total for _, total in counts))

    def save(self, place: str) -> None:
        """Write a file of each rank's rows, and index.json last, to a folder or a bucket; one there is replaced."""
        ranks = self._ranks
        store = open_store(place)
        files = []
        for part in self._parts:
            if not part.spans:
                continue
            record: dict[str, Any] = {"spans": [[span.first, span.count] for span in part.spans]}
            for kind, index in (("rows", part.flat), ("fast", part.fast)):
                if index is None:
                    continue
                data = load_faiss().serialize_index(index).tobytes()
                digest = hashlib.sha256(data).hexdigest()
                name = f"{part.spans[0].first:020d}-{digest[:12]}.{kind}.faiss"
                store.put(name, data)
                record[kind] = {"name": name, "sha256": digest}
            files.append(record)
        parts = [record for each in ranks.collect(files) for record in each]
        if ranks.rank == 0:
            parts.sort(key=lambda record: record["spans"])
            manifest = {"format": FORMAT, "dims": self.dims, "factory": self.factory, "parts": parts}
            store.put(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        ranks.collect(None)

    @classmethod
    def load(
        cls,
        place: str,
        *,
        group: dist.ProcessGroup | None = None,
        memory: int = MEMORY,
    ) -> "ShardedIndex":
        """The index that was saved there, by any number of ranks: each has some of its files.

        FAISS reads files that were made to harm it without care: load only what you trust.

        Raises:
            InputError: where there is no index, or a file of it is missing, damaged or of another index or FAISS.
        """
        ranks = ranks_of(group)
        index: ShardedIndex | InputError
        try:
            index = cls._read(place, group, memory)
        except InputError as error:
            index = error
        failure = index if isinstance(index, InputError) else None
        ranks.collect(failure)
        assert isinstance(index, ShardedIndex)
        spans = ranks.collect([span for part in index._parts for span in part.spans])
        index._spans = [span for each in spans for span in each]
        return index

    @classmethod
    def _read(cls, place: str, group: dist.ProcessGroup | None, memory: int) -> "ShardedIndex":
        """This rank's part of a saved index."""
        store = open_store(place)
        where = store.url(MANIFEST)
        require((store.exists(MANIFEST), f"{where}: no such file: ShardedIndex.save writes one"))
        try:
            manifest = json.loads(store.read(MANIFEST))
            if manifest["format"] != FORMAT:
                raise InputError(f"{where}: format {manifest['format']!r}, but this program reads {FORMAT}")
            index = cls(manifest["dims"], factory=manifest["factory"], group=group, memory=memory)
            ranks = index._ranks
            records = manifest["parts"]
            first = len(records) * ranks.rank // ranks.world
            last = len(records) * (ranks.rank + 1) // ranks.world
            for record in records[first:last]:
                spans = [Span(start, count, ranks.rank) for start, count in record["spans"]]
                found = {}
                for kind in ("rows", "fast"):
                    found[kind] = None
                    if kind in record:
                        found[kind] = index._parsed(place, record[kind], spans)
                index._parts.append(Part(found["rows"], found["fast"], spans))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where}: malformed ({type(error).__name__}: {error}): save the index again") from None
        if len(index._parts) > 1:
            del index._parts[0]
        return index

    def _parsed(
        self,
        place: str,
        file: dict[str, str],
        spans: list[Span],
    ) -> Any:
        """The FAISS index in a file, which must be of these spans."""
        store = open_store(place)
        url = store.url(file["name"])
        data = store.read(file["name"])
        sound = hashlib.sha256(data).hexdigest() == file["sha256"]
        require((sound, f"{url}: cut, damaged or of another index: save the index again"))
        try:
            found = load_faiss().deserialize_index(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            raise InputError(f"{url}: this FAISS cannot read it: {one_line(error)}") from None
        fits = found.d == self.dims and found.ntotal == sum(span.count for span in spans)
        require((fits, f"{url}: not the rows that {MANIFEST} says: save the index again"))
        return found

    def _new_part(self) -> Part:
        """Empty indexes."""
        faiss = load_faiss()
        fast = None
        if self.factory != "Flat":
            try:
                fast = faiss.index_factory(self.dims, self.factory)
            except RuntimeError as error:
                raise ValueError(f"ShardedIndex: factory {self.factory!r}: {one_line(error)}") from None
        return Part(faiss.IndexFlatL2(self.dims), fast)

    def _checked(self, rows: Tensor, first_id: int) -> Span:
        """The ids of rows that are added. Raises ValueError."""
        rank = self._ranks.rank
        self._check_rows(rows, "rows")
        if not isinstance(first_id, int) or not 0 <= first_id <= MAX_ID - len(rows):
            raise ValueError(f"ShardedIndex: the ids of rank {rank} leave [0, 2**62): they start at {first_id}")
        mine = [span for span in self._spans if span.rank == rank]
        if mine and len(rows) and first_id < mine[-1].first + mine[-1].count:
            had = mine[-1].first + mine[-1].count - 1
            raise ValueError(f"ShardedIndex: ids must ascend on a rank: rank {rank} has {had}, and adds {first_id}")
        return Span(first_id, len(rows), rank)

    def _check_rows(self, rows: Tensor, what: str) -> None:
        rank = self._ranks.rank
        if not are_rows(rows) or rows.shape[1] != self.dims:
            needed = f"the {what} of rank {rank} must be a float32 torch tensor (n, {self.dims})"
            raise ValueError(f"ShardedIndex: {needed}, not {described(rows)}")
        check_finite(rows, f"the {what} of rank {rank}", first_row=0)

    def _search(
        self,
        queries: Tensor,
        k: int,
        *,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        ranks = self._ranks
        mine: int | ValueError
        try:
            self._check_rows(queries, "queries")
            if not isinstance(k, int) or k < 1:
                raise ValueError(f"ShardedIndex: k is {k!r}: it must be at least 1")
            mine = len(queries)
        except ValueError as error:
            mine = error
        counts = ranks.collect(mine)
        step = max(1, self.memory // (4 * self.dims * ranks.world))
        found = []
        for low in range(0, max(1, *counts), step):
            part = queries.detach()[low : low + step]
            sizes = [min(step, max(0, count - low)) for count in counts]
            scan = Scan(
                ranks.gather(part, sizes),
                neighbours=k,
                method="auto",
                expected=sum(part.flat.ntotal for part in self._parts),
            )
            if exact:
                self._scan_all(scan)
            else:
                self._scan_proposed(scan)
            found.append(deliver_answers(scan, sizes, ranks))
        distances, ids = map(torch.cat, zip(*found, strict=True))
        return distances, ids

    def _scan_all(self, scan: Scan) -> None:
        """Search all rows of this rank, in blocks, as many on every rank."""
        blocks = []
        for part in self._parts:
            blocks += list(zip(part.rows.split(ROWS), part.ids.split(ROWS), strict=True))
        most = max(self._ranks.collect(len(blocks)))
        none = (torch.empty(0, self.dims), torch.empty(0, dtype=torch.int64))
        blocks += [none] * (most - len(blocks))
        for number, (rows, ids) in enumerate(blocks):
            search_block(
                scan,
                rows,
                ids,
                self._ranks,
                first=number == 0,
            )

    def _scan_proposed(self, scan: Scan) -> None:
        """Measure the rows of this rank that FAISS proposes."""
        asked = scan.queries.cpu().numpy()
        faiss = load_faiss()
        faiss.omp_set_num_threads(torch.get_num_threads())
        for part in self._parts:
            if not part.flat.ntotal:
                continue
            count = min(scan.neighbours + FETCH, part.flat.ntotal)
            columns = torch.from_numpy(part.fast.search(asked, count)[1])
            rows, places = (columns >= 0).nonzero(as_tuple=True)
            device = scan.queries.device
            scan.add_pairs(
                part.rows.to(device),
                part.ids.to(device),
                rows.to(device),
                columns[rows, places].to(device),
            )
