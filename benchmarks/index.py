"""How fast tars by others are indexed from an S3 server, beside boto3, which gets the same bytes and does nothing else.

    python benchmarks/index.py --shards 1000 --to benchmarks/results/index

SeaweedFS on loopback holds tars of 10 MB, each of JPEGs of about 38 kB with a caption and JSON, as img2dataset writes
them. Contenders take turns in a fresh process each; the best and the median count. boto3 gets eight objects at a time
by eight threads of one client, in pieces of a megabyte.
"""

import io
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from data_sets import add_sample, jpegs
from output import ROOT, page, write

sys.path.insert(0, str(ROOT))

SHARD = 10 << 20
"""Bytes."""
BOTO3 = "boto3, bytes alone"


@dataclass(kw_only=True)
class Settings:
    """Measure indexing."""

    to: Path
    """Where to write, without an ending."""
    shards: int = 1000
    """Tars of 10 MB."""
    repeats: int = 3
    """Runs of each."""


def headers(path: str, to: str) -> None:
    from naign.data.format.indexing import index

    index(path, to=to, sample_check=1)


def every_picture(path: str, to: str) -> None:
    from naign.data.format.indexing import index

    index(path, to=to)


def boto3_bytes(path: str, to: str) -> None:
    import boto3
    from botocore.config import Config

    bucket, _, prefix = path.removeprefix("s3://").partition("/")
    client = boto3.client("s3", config=Config(max_pool_connections=16))
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [entry["Key"] for found in pages for entry in found["Contents"]]

    def get(key: str) -> None:
        body = client.get_object(Bucket=bucket, Key=key)["Body"]
        while body.read(1 << 20):
            pass

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(get, keys))


CONTENDERS = {
    "naign index --sample-check 1": headers,
    "naign index, every picture decoded": every_picture,
    BOTO3: boto3_bytes,
}


def measure(name: str, path: str, to: str) -> None:
    """In a process of its own: print seconds and processor seconds, also of its children."""
    import boto3  # noqa: F401  # imports are not timed

    import naign.data.format.indexing  # noqa: F401

    begin = time.perf_counter()
    used = sum(os.times()[:4])
    CONTENDERS[name](path, to)
    seconds = time.perf_counter() - begin
    print(seconds, sum(os.times()[:4]) - used)


def tar(number: int) -> bytes:
    """About SHARD bytes of samples."""
    stream = io.BytesIO()
    draw = random.Random(number)
    with tarfile.open(fileobj=stream, mode="w") as target:
        sample = 0
        while stream.tell() < SHARD:
            add_sample(target, f"{number:05d}{sample:04d}", draw.choice(jpegs()))
            sample += 1
    return stream.getvalue()


def main(settings: Settings) -> None:
    from naign.storage.store import open_store
    from tests.servers import S3Server

    times: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    total = 0
    with tempfile.TemporaryDirectory() as scratch, S3Server(scratch) as server:
        path = f"{server.bucket('theirs')}/tars"
        os.environ.update(server.environment)
        store = open_store(path)
        for number in range(settings.shards):
            data = tar(number)
            store.put(f"{number:05d}.tar", data)
            total += len(data)
        for turn in range(settings.repeats):
            for place, name in enumerate(CONTENDERS):
                command = [sys.executable, __file__, "--measure", name, path, f"{scratch}/index-{turn}-{place}"]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    cwd=ROOT,
                    check=True,
                )
                wall, cpu = done.stdout.split()
                times[name].append([float(wall), float(cpu)])
                print(name, done.stdout.strip(), flush=True)
    text = page_of(times, total / 1e6, settings.shards)
    write(settings.to, text, {"megabytes": total / 1e6, "seconds": times})
    print(text)


def page_of(
    times: dict[str, list[list[float]]],
    megabytes: float,
    shards: int,
) -> str:
    floor = min(times[BOTO3])[0]
    rows = []
    for name, runs in times.items():
        seconds = [wall for wall, _ in runs]
        used = min(cpu for _, cpu in runs)
        cells = [
            f"{megabytes / min(seconds):.0f}",
            f"{megabytes / statistics.median(seconds):.0f}",
            f"{floor / min(seconds):.2f}",
            f"{1000 * used / megabytes:.1f}",
        ]
        rows.append([name, *cells])
    title = f"{shards} tars of {megabytes / shards:.1f} MB from SeaweedFS on loopback"
    return page(title, ["", "MB/s, best", "median", "× boto3", "processor s a GB"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main(tyro.cli(Settings))
