"""Page tables, and the samples in pages as WebDataset reads them."""

import hashlib
import io
import random
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from naign.data.format.pages import PAGE, ROW, TAR_BLOCK, Pager, parse_table
from naign.data.format.webdataset import NO_TAR, samples, scan
from naign.storage.store import open_store
from tests.refused import refused

NOISE = random.Random(0).randbytes(1 << 20)
LONG = "x" * 80
"""Twice this is more than a tar's plain field for a name holds; ustar takes it in two fields."""


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# Tables


def expected(data, starts, end):
    """The table of samples that start there, said in one go."""
    pages = []
    for number, start in enumerate(starts):
        if number % 16 == 0 or start - pages[-1][1] >= PAGE:
            pages.append((number, start))
    rows = []
    stops = [start for _, start in pages[1:]]
    for (number, start), stop in zip(pages, [*stops, end], strict=True):
        digest = hashlib.sha256(data[start:stop]).digest()
        rows.append((number, start, digest))
    return [*rows, (len(starts), end, bytes(32))]


SIZES = st.one_of(
    st.integers(2, 8),
    st.integers(2, 200),
    st.just(PAGE // TAR_BLOCK),
)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 3),  # blocks before the first sample
    st.lists(SIZES, min_size=1, max_size=40),
    st.lists(st.integers(300, 150_000), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_a_table_is_the_same_however_it_is_told(
    lead,
    blocks,
    chunks,
    chance,
):
    edges = TAR_BLOCK * np.cumsum([lead, *blocks])
    *starts, end = edges.tolist()
    data = (NOISE * (1 + end // len(NOISE)))[:end] + bytes(2 * TAR_BLOCK)
    pager = Pager()
    todo = list(starts)
    while pager.size < len(data) or todo:
        if todo and todo[0] <= pager.size and chance.random() < 0.5:
            pager.start(todo.pop(0))
        else:
            end_of_chunk = pager.size + chance.choice(chunks)
            pager.write(memoryview(data)[pager.size : end_of_chunk])
    assert pager.get(end, pager.size) == bytes(2 * TAR_BLOCK)
    pager.end = end
    file = pager.shard("a.tar")[1]
    table = parse_table(file, samples=len(starts), size=len(data))
    assert [row.tolist() for row in table] == expected(data, starts, end)
    assert table.dtype == ROW
    assert file == saved(table)


def table(*rows):
    full = [(sample, byte, bytes(32)) for sample, byte in rows]
    return saved(np.array(full, ROW))


SOUND = (
    (0, 0),
    (3, 70_000),
    (5, 99_000),
)


@pytest.mark.parametrize(
    "data",
    [
        saved(np.zeros(3, np.int64)),
        saved(np.zeros((3, 1), ROW)),
        table(*SOUND)[:-1],
        b"",
        table((1, 0), (5, 99_000)),
        table((0, 0), (5, 100_001)),
        table((0, -512), (5, 99_000)),
        table(
            (0, 0),
            (3, 70_000),
            (3, 80_000),
            (5, 99_000),
        ),
        table(
            (0, 0),
            (3, 80_000),
            (4, 70_000),
            (5, 99_000),
        ),
        table(
            (0, 0),
            (3, 70_000),
            (4, 70_100),
            (5, 99_000),
        ),
    ],
)
def test_nonsense_is_no_table(data):
    parse_table(table(*SOUND), samples=5, size=100_000)
    with pytest.raises(ValueError):
        parse_table(data, samples=5, size=100_000)


# Samples


def members():
    found = [
        ("./", None),
        ("folder", None),
        ("__index__", b"passed over"),
    ]
    stems = [
        "plain",
        "folder/inner",
        "a.folder/in.ner",
        "ümlaut/日本",
        LONG,
        f"{LONG}/{LONG}",
        f"{LONG * 3}",
        "./dot",
    ]
    for number in range(60):
        stem = f"{stems[number % len(stems)]}-{number:03d}"
        size = [0, 1, 511, 512, 513, 30_000][number % 6]
        found.append((f"{stem}.npy", NOISE[number : number + size]))
        found.append((f"{stem}.seg.PNG", b"two suffixes"))
        found.append((f"{stem}.cls", b"7"))
        if number % 7 == 0:
            found.append(("folder/more", None))
            found.append((f"__meta{number}__/a.json", b"{}"))
            found.append((f"__meta{number}__", b"x"))
        if number % 9 == 0:
            found += [("no-suffix", b"z"), (f"__half{number}.txt", b"a sample like others")]
    return found


def write(file, form, content):
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return file


def by_webdataset(file):
    """What WebDataset reads, without what it adds of its own."""
    found = []
    for sample in webdataset.WebDataset(str(file), shardshuffle=False, empty_check=False):
        names = [name for name in sample if name == "__key__" or not name.startswith("__")]
        found.append({name: sample[name] for name in names})
    return found


def by_pages(file, *, at_once=1):
    """What is in the pages of the file's own table, read `at_once` at a time."""
    pager = Pager()
    count = len(list(scan(open_store(str(file.parent)), file.name, pager)))
    shard, content = pager.shard(file.name)
    table = parse_table(content, samples=shard.samples, size=shard.bytes)
    data = file.read_bytes()
    found = []
    for low in range(0, len(table) - 1, at_once):
        high = min(low + at_once, len(table) - 1)
        first, start, _ = table[low].tolist()
        last, stop, _ = table[high].tolist()
        part = list(samples(data[start:stop]))
        assert len(part) == last - first
        found += part
    assert len(found) == count
    return found


@pytest.mark.parametrize("at_once", [1, 1000])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, form, at_once):
    content = members()
    if form == tarfile.USTAR_FORMAT:
        content = [(name, data) for name, data in content if LONG * 3 not in name]
    file = write(tmp_path / "a.tar", form, content)
    found = by_pages(file, at_once=at_once)
    assert found == by_webdataset(file)
    assert len(found) > 50
    assert {"npy", "seg.png", "cls"} < set(found[0])


UNUSUAL = ["__x__.npy", "__x__a/b.npy", "_x_/b.npy", "__x/b__.npy", ".hidden/b.npy", "a/.hidden", "a./b.npy"]


@pytest.mark.parametrize("name", [*UNUSUAL, "__/b.npy", "___/b.npy"])
def test_unusual_names(tmp_path, name):
    content = [
        ("first.npy", b"1"),
        (name, b"2"),
        ("last.npy", b"3"),
    ]
    file = write(tmp_path / "a.tar", tarfile.USTAR_FORMAT, content)
    assert by_pages(file) == by_webdataset(file)


def header(name, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.type = kind
    return bytearray(info.tobuf(tarfile.USTAR_FORMAT))


def summed(data):
    """A header with the checksum of what it holds now."""
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:]))
    return bytes(data)


def test_headers_of_other_kinds(tmp_path):
    """Pipes and labels are passed over; files laid out to be contiguous, and those of tars before ustar, are read."""
    old = header("c.npy")
    old[257:265] = bytes(8)
    headers = [
        header("a.npy"),
        header("pipe", b"6"),
        header("b.npy", b"7"),
        header("label", b"V"),
        summed(old),
    ]
    file = tmp_path / "a.tar"
    file.write_bytes(b"".join([*headers, bytes(2 * TAR_BLOCK)]))
    found = by_pages(file)
    assert found == by_webdataset(file)
    assert [sample["__key__"] for sample in found] == ["a", "b", "c"]


def test_names_that_are_no_utf8(tmp_path):
    name = header("\0.npy")
    name[0] = 0xFC
    (tmp_path / "a.tar").write_bytes(summed(name) + bytes(2 * TAR_BLOCK))
    with refused("not printable UTF-8"):
        by_pages(tmp_path / "a.tar")


def test_pages_of_nonsense(tmp_path):
    content = [("a.npy", NOISE[:5000]), ("b.npy", NOISE[:5000])]
    file = write(tmp_path / "a.tar", tarfile.USTAR_FORMAT, content)
    whole = file.read_bytes()[: 2 * (512 + 5120)]
    assert len(list(samples(whole))) == 2
    for damaged in (whole[:-600], whole[:700], whole[512:]):
        with pytest.raises(NO_TAR):
            list(samples(damaged))


def test_a_size_that_is_no_number_is_refused():
    wrong = header("a.cls")
    wrong[124:136] = b"00000018000\0"
    with pytest.raises(NO_TAR):
        list(samples(summed(wrong) + bytes(TAR_BLOCK)))
