"""Indexing tars in buckets that may only be read, and going on after a kill."""

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from naign.data.dataset import DataConfig
from naign.data.decode import encode
from naign.data.format import IndexOptions, indexing, samples
from naign.data.format.audit import verify
from naign.data.format.indexing import index
from naign.data.format.manifest import Manifest
from naign.data.format.survey import KEPT, Summary, summarize
from naign.data.format.writer import pack
from naign.data.loader import Stream, read_split
from naign.errors import InputError
from naign.storage.local import LocalStore
from naign.storage.store import open_store
from tests.data.numbered import add, numbered
from tests.hosts.test_launch import is_over


def png(value: int) -> bytes:
    return encode(np.full((1, 4, 4), value % 256, np.uint8), "png")


def write(path: str, names: list[str], each: int = 3, **fields: Any) -> None:
    """Tars of so many pictures each, whose value is their number modulo 256; `fields` make further members from it."""
    number = 0
    for name in names:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for _ in range(each):
                add(tar, f"{number:05d}.png", png(number))
                for suffix, make in fields.items():
                    add(tar, f"{number:05d}.{suffix}", make(number))
                number += 1
        open_store(path).put(name, stream.getvalue())


TARS = [f"{number:05d}.tar" for number in range(7)]


@pytest.mark.parametrize("remote", [False, True])
def test_an_index_lies_elsewhere(bucket: str, tmp_path: Path, remote: bool) -> None:
    theirs, mine = f"{bucket}/theirs", f"{bucket}/mine" if remote else str(tmp_path / "mine")
    write(theirs, [*TARS, "val.tar"])
    manifest = index(theirs, to=mine, progress=False)
    assert open_store(theirs).list() == [*TARS, "val.tar"]
    assert len(open_store(mine).list()) == 9 and Manifest.load(mine) == manifest
    config = DataConfig(path=theirs, index=mine)
    assert read_split(config, "train")[0][:, 0, 0, 0].tolist() == list(range(21))
    with Stream(config, seed=0, round_size=21) as stream:
        assert sorted(stream.take(0).images[:, 0, 0, 0].tolist()) == list(range(21))
    assert verify(theirs, index=mine, progress=False).samples == 24
    with pytest.raises(InputError, match=r"no index.json among its 8 files"):
        read_split(theirs, "train")


def test_braces_and_patterns_choose_tars(tmp_path: Path) -> None:
    write(str(tmp_path), TARS)
    for pattern, count in (("{00001..00003}.tar", 9), ("0000[45].tar", 6), ("00006.tar", 3)):
        made = index(f"{tmp_path}/{pattern}", to=str(tmp_path / "index"), force=True, progress=False)
        assert made.split("train").samples == count
    with pytest.raises(InputError, match=r"00007\.tar: no such file"):
        index(f"{tmp_path}/{{00006..00007}}.tar", to=str(tmp_path / "other"), progress=False)
    with pytest.raises(InputError, match=r"no \.tar there"):
        index(f"{tmp_path}/x*.tar", progress=False)


def test_only_shards_that_were_not_read_yet_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), TARS)
    expected = index(str(tmp_path), to=str(tmp_path / "whole"), progress=False)
    read, scanned = [], samples.scan

    def counted(store: Any, file: str, *rest: Any) -> Any:
        read.append(file)
        if len(read) in (3, 6):
            raise KeyboardInterrupt
        return scanned(store, file, *rest)

    monkeypatch.setattr(samples, "scan", counted)
    monkeypatch.setattr(indexing, "THREADS", 1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            index(str(tmp_path), to=str(tmp_path / "mine"), progress=False)
        assert not (tmp_path / "mine/index.json").exists()
    assert index(str(tmp_path), to=str(tmp_path / "mine"), progress=False) == expected
    assert sorted(read) == sorted([*TARS, read[2], read[5]])  # those in which it was killed twice
    assert not list((tmp_path / "mine").glob("*.indexing.json"))
    assert verify(str(tmp_path), index=str(tmp_path / "mine"), progress=False).samples == 21


def test_what_was_kept_of_another_tar_or_with_other_settings_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), TARS[:1], cls=lambda n: b"%d" % n)
    read, scanned, mine = [], samples.scan, str(tmp_path / "mine")

    def counted(store: Any, file: str, *rest: Any) -> Any:
        read.append(file)
        return scanned(store, file, *rest)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def reads(**options: Any) -> bool:
        read.clear()
        with pytest.raises(KeyboardInterrupt):
            index(str(tmp_path), progress=False, **{"to": mine, **options})
        return bool(read)

    monkeypatch.setattr(samples, "scan", counted)
    monkeypatch.setattr(indexing, "_write", interrupted)
    assert reads() and not reads() and not reads(keep_broken=True)
    for options in ({"sample_check": 1}, {"label": "name:(.)$"}, {"to": ""}):
        assert reads(**options) and not reads(**options)
    (tmp_path / "mine" / f"{TARS[0][:-4]}{KEPT}").write_bytes(b"cut")
    assert reads() and not reads()
    write(str(tmp_path), TARS[:1], cls=lambda n: b"%d" % n)  # at another time
    assert reads() and not reads()


def test_what_was_kept_and_then_changed_is_not_used(tmp_path: Path) -> None:
    write(str(tmp_path), TARS[:1], cls=lambda n: b"%d" % n)
    found = summarize(open_store(str(tmp_path)), TARS[0], IndexOptions(), whole=True)
    kept = found.dump("1")
    again = Summary.parse(kept, "1")
    assert again is not None and again.shard == found.shard and again.table == found.table
    assert again.survey == found.survey and (again.keys == found.keys).all()
    assert Summary.parse(kept, "2") is None
    for before, after in {b"00000.tar": b"00001.tar", b"image": b"point", b": [1, 4, 4]": b": [3, 4, 4]"}.items():
        assert before in kept and Summary.parse(kept.replace(before, after), "1") is None, before
    damages = [b"", b"[]", b"{}", kept[:-20], b"[" * 100_000, b"5"]
    for damaged in (*damages, b'{"sha256": "", "record": 5}', b'{"sha256": ""}'):
        assert Summary.parse(damaged, "1") is None
    body = json.dumps({**json.loads(json.loads(kept)["record"]), "survey": {"of": "another version"}})
    changed = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "record": body})
    assert Summary.parse(changed.encode(), "1") is None


@pytest.mark.slow
def test_processes_find_what_threads_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), TARS)
    threads = index(str(tmp_path), to=str(tmp_path / "threads"), progress=False)
    monkeypatch.setattr(indexing, "MUCH", 0)
    monkeypatch.setattr(indexing, "cpu_count", lambda: 2)
    assert index(str(tmp_path), to=str(tmp_path / "processes"), progress=False) == threads
    for file in (tmp_path / "threads").iterdir():
        assert file.read_bytes() == (tmp_path / "processes" / file.name).read_bytes()
    (tmp_path / TARS[2]).write_bytes(b"no tar" * 1000)
    with pytest.raises(InputError, match=rf"1 problems\n.*{TARS[2]}: truncated or no tar"):
        index(str(tmp_path), to=str(tmp_path / "broken"), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("much", [1 << 40, 0], ids=["threads", "processes"])
def test_a_killed_index_goes_on(tmp_path: Path, much: int) -> None:
    write(str(tmp_path), [f"{number:05d}.tar" for number in range(200)], each=40)
    code = f"import sys; from naign.data.format import indexing; indexing.MUCH = {much}; "
    code += "from naign.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "index", str(tmp_path), "--to", str(tmp_path / "mine")]
    kept = 0
    kills = 3 if much else 1
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "mine").glob("*.indexing.json"))) < kept + 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        theirs = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while not all(map(is_over, theirs)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(map(is_over, theirs)) and len(theirs) >= (0 if much else 2)
        assert not (tmp_path / "mine/index.json").exists()
        assert (kept := len(list((tmp_path / "mine").glob("*.indexing.json")))) >= 20
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "mine").glob("*.indexing.json")}
    assert kept >= 20 * kills and len(before) == kept
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert verify(str(tmp_path), index=str(tmp_path / "mine"), progress=False).samples == 8000


@pytest.mark.parametrize(
    ("label", "fields", "names", "expected"),
    [
        (
            "json:kind",
            {"json": lambda n: b'{"kind": "%s"}' % (b"cat", b"dog")[n % 2]},
            ("cat", "dog"),
            [0, 1, 0],
        ),
        ("json:id", {"json": lambda n: b'{"id": %d}' % (10 - n)}, ("8", "9", "10"), [2, 1, 0]),
        ("name:(.)$", {}, ("0", "1", "2"), [0, 1, 2]),
        ("", {"cls": lambda n: b"%d" % (2 * n)}, ("0", "1", "2", "3", "4"), [0, 2, 4]),
        ("", {"txt": lambda n: b"a caption", "json": lambda n: b"{}"}, (), [-1, -1, -1]),
    ],
)
def test_labels_are_found_where_they_are(
    tmp_path: Path, label: str, fields: dict[str, Any], names: tuple[str, ...], expected: list[int]
) -> None:
    write(str(tmp_path), ["train.tar"], **fields)
    assert index(str(tmp_path), label=label, progress=False).labels == names
    assert read_split(str(tmp_path), "train")[1].tolist() == expected
    assert verify(str(tmp_path), progress=False).samples == 3


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("text", "--label 'text': give json:FIELD"),
        ("json:", "--label 'json:': give json:FIELD"),
        ("name:(", "no regular expression"),
        ("name:(a{4294967296})", "no regular expression"),
        ("name:.", "0 groups in brackets"),
        ("json:kind", "no sample has a label where --label says: json:kind"),
        ("name:(0)$", r"key 00001: no label \(name:\(0\)\$\), unlike others"),
    ],
)
def test_labels_that_are_nowhere(tmp_path: Path, label: str, message: str) -> None:
    write(str(tmp_path), ["train.tar"], json=lambda n: b"{}")
    with pytest.raises(InputError, match=message):
        index(str(tmp_path), label=label, progress=False)
    assert not (tmp_path / "index.json").exists() and not list(tmp_path.glob("*.npy"))


def test_headers_tell_what_decoding_would(tmp_path: Path) -> None:
    write(str(tmp_path), ["a.tar", "b.tar"])
    whole = index(str(tmp_path), to=str(tmp_path / "1"), progress=False)
    assert index(str(tmp_path), to=str(tmp_path / "2"), sample_check=0, progress=False) == whole
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(4):
            add(tar, f"{number}.png", png(number)[: 45 if number else 999])
    (tmp_path / "b.tar").write_bytes(stream.getvalue())
    made = index(str(tmp_path / "b.tar"), to=str(tmp_path / "3"), sample_check=1, progress=False)
    assert made.split("train").samples == 4
    with pytest.raises(InputError, match=r"3 problems\n.*key 1: the \.png cannot be decoded"):
        index(str(tmp_path / "b.tar"), to=str(tmp_path / "4"), progress=False)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path / "data[1]"), ["train.tar"])
    for options, message in (
        ({"sample_check": -1}, "--sample-check -1"),
        ({"labels": ("a",)}, "no sample has a label"),
    ):
        with pytest.raises(InputError, match=message):
            index(str(tmp_path / "data[1]"), progress=False, **options)  # type: ignore[arg-type]
    made = index(str(tmp_path / "data[1]"), progress=False)  # its name is no pattern
    content = json.loads((tmp_path / "data[1]/index.json").read_text())
    (tmp_path / "data[1]/index.json").write_text(json.dumps({**content, "label": "name:("}))
    with pytest.raises(InputError, match=r"index.json: malformed \(label 'name:\('"):
        Manifest.load(str(tmp_path / "data[1]"))
    for field, value in (("tables", ""), ("broken", {"train.tar": 5}), ("broken", ["a"])):
        (tmp_path / "data[1]/index.json").write_text(json.dumps({**content, field: value}))
        with pytest.raises(InputError, match=r"index.json: malformed"):
            Manifest.load(str(tmp_path / "data[1]"))
    assert made.name == "data[1]"


def test_labels_of_equal_value_have_one_order(tmp_path: Path) -> None:
    write(str(tmp_path), ["train.tar"], each=4, json=lambda n: b'{"l": "%s"}' % (b"7", b"007", b"07", b"10")[n])
    assert index(str(tmp_path), label="json:l", progress=False).labels == ("007", "07", "7", "10")


@pytest.mark.parametrize("size", [b"-0000001000\0", b"0000001_000\0", b"00000018000\0"])
def test_a_size_that_is_no_number_is_refused(tmp_path: Path, size: bytes) -> None:
    write(str(tmp_path), ["train.tar"])
    data = bytearray((tmp_path / "train.tar").read_bytes())
    data[124:136] = size
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    (tmp_path / "train.tar").write_bytes(data)
    with pytest.raises(InputError, match="truncated or no tar"):
        index(str(tmp_path), progress=False)


def test_page_tables_of_our_own_tars_are_made_anew(tmp_path: Path) -> None:
    pack(numbered(), str(tmp_path), shards=2, progress=False)
    before = Manifest.load(str(tmp_path))
    assert index(str(tmp_path), name="numbered", labels=("even", "odd"), force=True, progress=False) == before


def test_a_broken_tar_costs_no_second_reading_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, scanned = [], samples.scan

    def counted(store: Any, file: str, *rest: Any) -> Any:
        read.append(file)
        return scanned(store, file, *rest)

    monkeypatch.setattr(samples, "scan", counted)
    write(str(tmp_path), TARS)
    sound = (tmp_path / TARS[2]).read_bytes()
    (tmp_path / TARS[2]).write_bytes(sound[:2000])
    for turn in range(2):
        with pytest.raises(InputError, match=rf"1 problems\n.*{TARS[2]}: .*\n.* 6 sound tars is kept"):
            index(str(tmp_path), progress=False)
        assert sorted(read) == (sorted(TARS) if not turn else [TARS[2]])
        read.clear()
    (tmp_path / TARS[2]).write_bytes(sound)
    manifest = index(str(tmp_path), keep_broken=True, progress=False)  # what they hold is the same with that
    assert read == [TARS[2]] and verify(str(tmp_path), progress=False).samples == manifest.split("train").samples == 21
    assert not list(tmp_path.glob("*.indexing.json"))


def test_samples_that_were_indexed_as_broken_are_known(tmp_path: Path) -> None:
    """And others are not: those that break later, or whose bytes change."""
    write(str(tmp_path), TARS[:2])
    tar = bytearray((tmp_path / TARS[0]).read_bytes())
    middle = tar.index(b"IDAT") - 20  # the first picture's header
    tar[middle : middle + 8] = b"\xff" * 8
    (tmp_path / TARS[0]).write_bytes(tar)
    with pytest.raises(InputError, match=r"1 problems\n.*key 00000: the \.png cannot be decoded"):
        index(str(tmp_path), progress=False)
    manifest = index(str(tmp_path), keep_broken=True, progress=False)
    assert manifest.broken == {TARS[0]: ["00000"]} and Manifest.load(str(tmp_path)) == manifest
    assert verify(str(tmp_path), progress=False).broken == ((TARS[0], "00000"),)
    other = bytearray((tmp_path / TARS[1]).read_bytes())
    place = other.index(b"IDAT") - 20
    other[place : place + 8] = b"\xff" * 8
    (tmp_path / TARS[1]).write_bytes(other)
    with pytest.raises(InputError, match=rf"2 problems\n.*{TARS[1]}, key 00003: .*\n.*{TARS[1]}: its SHA-256"):
        verify(str(tmp_path), progress=False)


def test_a_forced_index_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before any of its writes and deletions, it leaves the old index, the new one, or none."""
    monkeypatch.setattr(indexing, "THREADS", 1)
    old, new, mine = (str(tmp_path / name) for name in ("old", "new", "mine"))
    write(old, TARS[:3])
    write(new, TARS[1:4], each=5)
    done, put, delete = [0], LocalStore.put, LocalStore.delete

    def interrupted(call: Any) -> Any:
        def changed(store: LocalStore, name: str, *rest: bytes) -> None:
            done[0] -= 1
            if done[0] < 0 and not name.endswith(KEPT):
                raise KeyboardInterrupt
            call(store, name, *rest)

        return changed

    monkeypatch.setattr(LocalStore, "put", interrupted(put))
    monkeypatch.setattr(LocalStore, "delete", interrupted(delete))
    which, steps = [], 0
    while not which or which[-1] != "finished":
        done[0] = 10_000
        for file in Path(mine).glob("*"):
            file.unlink()
        index(old, to=mine, progress=False)
        done[0], steps = steps, steps + 1
        try:
            index(new, to=mine, force=True, progress=False)
            which.append("finished")
        except KeyboardInterrupt:
            done[0] = 10_000
            if not (Path(mine) / "index.json").exists():
                which.append("none")
                assert index(new, to=mine, progress=False).split("train").samples == 15
            else:
                which.append("old" if Manifest.load(mine).split("train").samples == 9 else "new")
        done[0] = 10_000
        assert verify(old if which[-1] == "old" else new, index=mine, progress=False).samples in (9, 15)
    states = ["old", "none", "new", "finished"]
    assert set(states) == set(which) and which == sorted(which, key=states.index)
    assert len(list(Path(mine).iterdir())) == 4
    config = DataConfig(path=new, index=mine, cache=str(tmp_path / "cache"))
    assert len(read_split(config, "train")[0]) == 15
