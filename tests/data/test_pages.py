"""Page tables, and the samples in pages as WebDataset reads them."""

import hashlib
import io
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from naign.data.format.pages import BLOCK, PAGE, ROW, Pager, Table, parse_table
from naign.data.format.webdataset import samples, scan
from naign.errors import InputError
from naign.storage.store import open_store

NOISE = random.Random(0).randbytes(1 << 20)


def expected(data: bytes, starts: list[int], end: int) -> list[tuple[int, int, bytes]]:
    """The table of samples that start there, said in one go."""
    pages: list[tuple[int, int]] = []
    for number, start in enumerate(starts):
        if number % 16 == 0 or start - pages[-1][1] >= PAGE:
            pages.append((number, start))
    edges = [*(start for _, start in pages), end]
    rows = [
        (number, start, hashlib.sha256(data[start:stop]).digest())
        for (number, start), stop in zip(pages, edges[1:], strict=True)
    ]
    return [*rows, (len(starts), end, bytes(32))]


def finished(pager: Pager, end: int) -> bytes:
    """The file of the page table of a tar whose last sample ends at byte `end`."""
    pager.end = end
    return pager.shard("a.tar")[1]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 3),  # blocks before the first sample
    st.lists(st.one_of(st.integers(2, 8), st.integers(2, 200), st.just(PAGE // BLOCK)), min_size=1, max_size=40),
    st.lists(st.integers(300, 150_000), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_a_table_is_the_same_however_it_is_told(
    lead: int, blocks: list[int], chunks: list[int], chance: random.Random
) -> None:
    edges = [BLOCK * (lead + sum(blocks[:number])) for number in range(len(blocks) + 1)]
    starts, end = edges[:-1], edges[-1]
    data = (NOISE * (1 + end // len(NOISE)))[:end] + bytes(2 * BLOCK)
    pager = Pager()
    told, place, todo = 0, 0, list(starts)
    while told < len(data) or todo:
        if todo and (told >= len(data) or chance.random() < 0.5):
            pager.start(todo.pop(0))
        else:
            size = chunks[place % len(chunks)]
            pager.write(memoryview(data)[told : told + size])
            told, place = told + size, place + 1
    assert pager.get(end, pager.size) == bytes(2 * BLOCK)
    file = finished(pager, end)
    table = parse_table(file, samples=len(starts), size=len(data))
    assert [row.tolist() for row in table] == expected(data, starts, end)
    assert ((np.diff(table["byte"])[:-1] >= PAGE) | (table["sample"][1:-1] % 16 == 0)).all()
    assert {*range(0, len(starts), 16)} <= {*table["sample"].tolist()}  # blocks of 16 are whole pages
    assert table.dtype == ROW and file == saved(table)


def test_all_starts_before_all_bytes_and_after() -> None:
    starts, end = [number * 40 * BLOCK for number in range(30)], 1200 * BLOCK
    data = NOISE[:end]
    for early in (True, False):
        pager = Pager()
        for step in (0, 1):
            if (step == 0) == early:
                for start in starts:
                    pager.start(start)
            else:
                for at in range(0, end, 1001):
                    pager.write(data[at : min(end, at + 1001)])
        found = parse_table(finished(pager, end), samples=len(starts), size=len(data))
        assert [row.tolist() for row in found] == expected(data, starts, end)


LONG = "x" * 80
"""Twice this is more than a tar's plain field for a name holds; ustar takes it in two fields."""


def members() -> list[tuple[str, bytes | None]]:
    """Names and bytes of what a tar may hold; None for a directory."""
    found: list[tuple[str, bytes | None]] = [("./", None), ("folder", None), ("__index__", b"passed over")]
    stems = [
        "plain",
        "folder/inner",
        "a.folder/in.ner",
        "ümlaut/日本",
        LONG,
        f"{'deep/' * 20}{LONG}",
        f"{LONG}/{LONG}",
        "./dot",
    ]
    for number in range(60):
        stem = f"{stems[number % len(stems)]}-{number:03d}"
        size = [0, 1, 511, 512, 513, 30_000][number % 6]
        found += [
            (f"{stem}.npy", NOISE[number : number + size]),
            (f"{stem}.seg.PNG", b"two suffixes"),
            (f"{stem}.cls", b"7"),
        ]
        if number % 7 == 0:
            found += [("folder/more", None), (f"__meta{number}__/a.json", b"{}"), (f"__meta{number}__", b"x")]
        if number % 9 == 0:
            found += [("no-suffix", b"z"), (f"__half{number}.txt", b"a sample like others")]
    return found


def write(file: Path, form: int, content: list[tuple[str, bytes | None]]) -> None:
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def by_webdataset(file: Path) -> list[dict[str, Any]]:
    """What WebDataset reads, without what it adds of its own."""
    found = webdataset.WebDataset(str(file), shardshuffle=False, empty_check=False)
    return [
        {name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")}
        for sample in found
    ]


def by_pages(file: Path, *, at_once: int) -> list[dict[str, Any]]:
    """What is in the pages of the file's own table, read `at_once` at a time."""
    pager = Pager()
    count = len(list(scan(open_store(str(file.parent)), file.name, pager)))
    shard, content = pager.shard(file.name)
    table = parse_table(content, samples=shard.samples, size=shard.bytes)
    data = file.read_bytes()
    found = []
    for low in range(0, len(table) - 1, at_once):
        high = min(low + at_once, len(table) - 1)
        part = list(samples(data[table["byte"][low] : table["byte"][high]]))
        assert len(part) == table["sample"][high] - table["sample"][low]
        found += part
    assert len(found) == count
    return found


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path: Path, form: int, at_once: int) -> None:
    file = tmp_path / "a.tar"
    write(file, form, members())
    found = by_pages(file, at_once=at_once)
    assert found == by_webdataset(file)
    assert len(found) > 60 and {"npy", "seg.png", "cls"} < set(found[0])


def test_members_that_are_no_samples_are_not_held(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", tarfile.USTAR_FORMAT, [("README", NOISE)] * 8 + [("a.npy", NOISE[:1000])])
    pager, held = Pager(), list[int]()
    found = list(scan(open_store(str(tmp_path)), "a.tar", pager, lambda _: held.append(len(pager._bytes))))
    assert [sample["npy"] for sample in found] == [NOISE[:1000]] and max(held) < 3 << 20
    assert by_pages(tmp_path / "a.tar", at_once=1) == by_webdataset(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "name",
    ["__x__.npy", "__x__a/b.npy", "_x_/b.npy", "__x/b__.npy", ".hidden/b.npy", "a/.hidden", "a./b.npy"]
    + [pytest.param(n) for n in ("__/b.npy", "___/b.npy")],
)
def test_unusual_names(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.tar"
    write(file, tarfile.USTAR_FORMAT, [("first.npy", b"1"), (name, b"2"), ("last.npy", b"3")])
    assert by_pages(file, at_once=1) == by_webdataset(file)


def test_headers_of_other_kinds(tmp_path: Path) -> None:
    """Pipes and labels are passed over; files laid out to be contiguous, and those of tars before ustar, are read."""
    headers = list[bytes]()
    for name, kind in (("a.npy", b"0"), ("pipe", b"6"), ("b.npy", b"7"), ("label", b"V"), ("c.npy", b"0")):
        info = tarfile.TarInfo(name)
        info.type = kind
        headers.append(info.tobuf(tarfile.USTAR_FORMAT))
    old = bytearray(headers.pop())
    old[257:265] = bytes(8)
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + 8 * 32 + sum(old[156:]))
    file = tmp_path / "a.tar"
    file.write_bytes(b"".join([*headers, old, bytes(2 * BLOCK)]))
    found = by_pages(file, at_once=1)
    assert found == by_webdataset(file) and [sample["__key__"] for sample in found] == ["a", "b", "c"]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("ümlaut.npy")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    with pytest.raises(InputError, match="not printable UTF-8"):
        by_pages(file, at_once=1)


def table(rows: list[tuple[int, int]]) -> bytes:
    made: Table = np.array([(sample, byte, bytes(32)) for sample, byte in rows], ROW)
    return saved(made)


def saved(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, np.zeros(2, ROW))
    return stream.getvalue()


SOUND = [(0, 0), (3, 70_000), (5, 99_000)]


@pytest.mark.parametrize(
    "data",
    [
        saved(np.zeros(3, np.int64)),
        saved(np.zeros((3, 1), ROW)),
        saved(np.zeros((), ROW)),
        saved(np.array([object()], object)),
        table(SOUND)[:-1],
        table(SOUND)[:50],
        b"no table at all",
        b"\x93NUMPY",
        table([(5, 99_000)]),
        table([]),
        table([(1, 0), (5, 99_000)]),
        table([(0, 0), (4, 99_000)]),
        table([(0, 0), (6, 99_000)]),
        table([(0, 0), (5, 100_001)]),
        table([(0, -512), (5, 99_000)]),
        table([(0, 0), (3, 70_000), (3, 80_000), (5, 99_000)]),
        table([(0, 0), (4, 70_000), (3, 80_000), (5, 99_000)]),
        table([(0, 0), (3, 80_000), (4, 70_000), (5, 99_000)]),
        table([(0, 0), (3, 70_000), (4, 70_100), (5, 99_000)]),
        table([(0, 0), (-(2**63), 70_000), (5, 99_000)]),
        table([(0, 0), (3, 2**63 - 1), (5, 99_000)]),
        *(pytest.param(odd) for odd in (b"", zipped(), b"PK\x03\x04 no zip")),
    ],
)
def test_nonsense_is_no_table(data: bytes) -> None:
    parse_table(table(SOUND), samples=5, size=100_000)
    with pytest.raises(ValueError):
        parse_table(data, samples=5, size=100_000)


@pytest.mark.parametrize("damage", [lambda data: data[:-600], lambda data: data[:700], lambda data: data[512:]])
def test_pages_of_nonsense(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "a.tar"
    write(file, tarfile.USTAR_FORMAT, [("a.npy", NOISE[:5000]), ("b.npy", NOISE[:5000])])
    whole = file.read_bytes()[: 2 * (512 + 5120)]
    assert len(list(samples(whole))) == 2
    with pytest.raises((tarfile.TarError, ValueError)):
        list(samples(damage(whole)))


def test_a_member_of_negative_size_is_refused() -> None:
    header = bytearray(tarfile.TarInfo("a.cls").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"-0000001000\0"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    with pytest.raises(tarfile.ReadError, match="invalid header"):
        list(samples(bytes(header) + bytes(BLOCK)))
