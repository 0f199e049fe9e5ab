"""Reading whole shards, and verifying a data set against its manifest."""

import gzip
import hashlib
import logging
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, cast

from tqdm import tqdm

from pipeline.data.format.manifest import INDEX, Manifest, size_problem
from pipeline.data.format.pages import Pager, grouped, key_and_suffix, table_name
from pipeline.data.format.shards import Shard
from pipeline.data.format.tar import BLOCK, Unusual, next_member
from pipeline.data.sample import decode
from pipeline.errors import InputError
from pipeline.storage.base import Store
from pipeline.storage.store import open_store
from pipeline.terminal import busy

log = logging.getLogger("naign.data")

BROKEN_TAR = (
    *(tarfile.TarError, EOFError, RecursionError, MemoryError, ValueError),  # headers that nest or lie
    *(zlib.error, lzma.LZMAError, gzip.BadGzipFile),  # a tar may be compressed
)
"""What reading a damaged tar raises. A disk or network that fails raises others, worth a retry."""

PROBLEMS = 20  # how many problems a message lists


class Report(NamedTuple):
    """What `verify` read and found sound, but for the samples that index.json says are broken."""

    samples: int
    shards: int
    bytes: int
    broken: tuple[tuple[str, str], ...]  # shard and key


class Problems(InputError):
    """What is wrong with a data set; the message lists the first of the `problems`."""

    def __init__(self, path: str, problems: list[str], note: str = "") -> None:
        shown = [f"  {problem}" for problem in problems[:PROBLEMS]]
        more = [f"  and {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
        super().__init__("\n".join([f"{path}: {len(problems)} problems", *shown, *more, *([note] if note else [])]))
        self.problems = problems


def scan(
    store: Store, name: str, pager: Pager, advance: Callable[[int], object] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """The samples of a shard as WebDataset gives them; all its bytes are told to `pager`, their number to `advance`.

    Raises InputError where they are no uncompressed tar or end early, or a sample has two members of a suffix.
    """
    where = store.url(name)
    with closing(store.pieces(name)) as pieces:

        def more() -> bool:
            data = next(pieces, b"")
            advance(pager.write(data))
            return bool(data)

        try:
            yield from grouped(_samples_members(_members(pager, more, where), where, pager), f"{where}, ")
            while more():
                pass
        except InputError:
            raise
        except BROKEN_TAR as error:
            raise InputError(f"{where}: truncated or no tar ({error}): copy it again, or repack the data set") from None


class _File(NamedTuple):
    """A regular file of a tar."""

    name: str
    begin: int  # of its header
    data: bytes
    end: int  # of the header behind it


def _members(pager: Pager, more: Callable[[], bool], where: str) -> Iterator[_File]:
    """The regular files of a tar whose bytes `more` tells to `pager`. `pager.after` is where the last member ends."""

    def get(first: int, last: int) -> bytes:
        while pager.told < last and more():
            pass
        return pager.get(first, last)

    while True:
        try:
            member = next_member(get, pager.after)
        except Unusual:
            yield from _unusual(pager, more, where)
            return
        if member is None:
            if not pager.after:
                raise tarfile.ReadError("empty file" if not pager.told else "it begins with zeros")
            return
        data = get(member.start, member.end)  # with the padding behind it
        if len(data) < member.end - member.start:
            raise tarfile.ReadError("unexpected end of data")
        pager.after = member.end
        if member.is_file:
            yield _File(member.name, member.begin, data[: member.size], member.end)


def _unusual(pager: Pager, more: Callable[[], bool], where: str) -> Iterator[_File]:
    """The same by tarfile, from `pager.after` on. Raises InputError for links and sparse files."""
    base = place = pager.after

    def read(size: int) -> bytes:
        nonlocal place
        while pager.told < place + size and more():
            pass
        data = pager.get(place, place + size)
        place += len(data)
        return data

    with tarfile.open(fileobj=cast(BinaryIO, SimpleNamespace(read=read)), mode="r|", bufsize=BLOCK) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else all headers of a large shard stay in memory
            if member.issym() or member.islnk() or member.issparse():
                raise InputError(f"{where}: {member.name} is a link or sparse: repack it with the files")
            stream = tar.extractfile(member) if member.isreg() else None
            pager.after = base + tar.offset
            if stream:
                yield _File(member.name, base + member.offset, stream.read(), base + tar.offset)


def _samples_members(files: Iterator[_File], where: str, pager: Pager) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and bytes of each member of a sample; `pager` is told where samples start and end."""
    last = None
    for file in files:
        if not (named := key_and_suffix(file.name)):
            continue
        if not named[0].isprintable():
            raise InputError(f"{where}, key {named[0]!r}: not printable UTF-8: repack the data set")
        if named[0] != last:
            last = named[0]
            pager.start(file.begin)
        yield *named, file.data
        pager.end = file.end


def ending(where: str, pager: Pager) -> Iterator[str]:
    """What is wrong behind the last sample: a tar that was cut between two samples reads as if whole."""
    rest = pager.rest(pager.after)
    if not pager.samples:
        yield f"{where}: holds no samples: remove it"
    if len(rest) < 2 * tarfile.BLOCKSIZE:
        yield f"{where}: ends in the middle: no end-of-archive mark: copy it again"
    elif rest.strip(b"\0"):
        yield f"{where}: more data behind the end of the archive, as of tars laid end to end: repack them"


def _scans(
    store: Store,
    names: Mapping[str, Sequence[str]],  # of the shards of each split
    check: Callable[[dict[str, Any], str], None],  # of a sample and the name of its shard: raises InputError
    problems: list[str],  # added to
    bar: "tqdm[Any]",
) -> Iterator[tuple[str, Pager]]:
    """Reads shards: name and measures of each that could be read to its end. No key may stand twice in a split."""
    for shards in names.values():
        keys: dict[str, str] = {}  # shard by key
        for name in shards:
            where, pager = store.url(name), Pager()
            try:
                for sample in scan(store, name, pager, bar.update):
                    key = sample["__key__"]
                    if key in keys:
                        problems.append(f"{where}, key {key}: also in {keys[key]}: repack the data set")
                    keys[key] = name
                    try:
                        check(sample, name)
                    except InputError as error:
                        problems.append(str(error))
            except InputError as error:  # missing, or no tar from some byte on
                problems.append(str(error))
            else:
                yield name, pager


bar_of_bytes = partial(tqdm, unit="B", unit_scale=True)


def verify(path: str, *, index: str = "", progress: bool = True) -> Report:
    """Read every byte of a data set: sizes, SHA-256, page tables, tar structure, pixels, shapes, labels, keys, counts.

    Samples that index.json says are broken may be. Raises Problems, each with its shard and key.
    """
    manifest, store, problems = Manifest.load(index or path), open_store(path), list[str]()
    tables = open_store(index) if index else store
    shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
    names = {name: [shard.name for shard in split.shards] for name, split in manifest.splits.items()}
    total = sum(shard.bytes for shard in shards.values())
    known = {name: set(keys) for name, keys in manifest.broken.items()}
    broken = list[tuple[str, str]]()

    def check(sample: dict[str, Any], name: str) -> None:
        where, key = store.url(name), sample["__key__"]
        try:
            _, label = decode(sample, manifest, where)
        except InputError:
            if key not in known.get(name, ()):
                raise
            broken.append((name, key))
            return
        if manifest.labels and label < 0:
            raise InputError(f"{where}, key {key}: no .cls, but {INDEX} has labels: repack it")

    with busy(f"asking for the sizes of {len(shards)} tars", shown=progress):
        for shard in shards.values():
            with suppress(InputError):  # one that is missing is named below
                problems += filter(None, [size_problem(store, shard)])
    with bar_of_bytes(desc=f"verify {manifest.name}", total=total, disable=not progress) as bar:
        for name, pager in _scans(store, names, check, problems, bar):
            pages = table_name(name, manifest.tables)
            problems += _differences(store, tables, pages, shards[name], pager.shard(name)[0])
    if problems:
        raise Problems(path, problems)
    samples = sum(shard.samples for shard in shards.values())
    return Report(samples=samples, shards=len(shards), bytes=total, broken=tuple(broken))


def _differences(store: Store, tables: Store, pages: str, shard: Shard, found: Shard) -> Iterator[str]:
    """Between a shard and its page table, of the name `pages`, as read and as the manifest says, but for the size."""
    where = store.url(shard.name)
    wrong = f"its SHA-256 is not the one in {INDEX}: copy it again, or repack the data set"
    if found.samples != shard.samples:
        yield f"{where}: {found.samples} samples, but {INDEX} says {shard.samples}: repack the data set"
    if shard.sha256 and found.bytes == shard.bytes and found.sha256 != shard.sha256:
        yield f"{where}: {wrong}"
    try:
        if hashlib.sha256(tables.read(pages)).hexdigest() != shard.pages:
            yield f"{tables.url(pages)}: {wrong}"
        elif found.bytes == shard.bytes and found.pages != shard.pages and not shard.sha256:
            yield f"{where}: other bytes than when it was indexed: copy it again, or run `naign index --force`"
        elif found.sha256 == shard.sha256 and found.pages != shard.pages:
            yield f"{tables.url(pages)}: not the page table of that shard: run `naign index --force`"
    except InputError as error:
        yield str(error)
