"""How fast tars by others are indexed from an S3 server, beside boto3, which gets the same bytes and does nothing else.

    python benchmarks/index.py --shards 1000 --to benchmarks/results/index

SeaweedFS on loopback holds tars of 10 MB, each of photographs as JPEGs of about 35 KB with a caption and JSON, as
img2dataset writes them. Contenders take turns in a fresh process each; the best and the median count. boto3 gets eight
objects at a time by eight threads of one client, whole, in pieces of a megabyte.
"""

import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sklearn.datasets
import tyro
from PIL import Image

from naign.storage.store import open_store

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.servers import S3Server  # noqa: E402

SHARD = 10 << 20  # bytes
RUN = """
import os, sys, time
begin, used = time.perf_counter(), sum(os.times()[:4])
{body}
print(time.perf_counter() - begin, sum(os.times()[:4]) - used)  # its processes', too
"""
BODIES = {
    "naign index --sample-check 1": """
from naign.data.format.indexing import index
begin, used = time.perf_counter(), sum(os.times()[:4])
index(sys.argv[1], to=sys.argv[2], sample_check=1, progress=False)""",
    "naign index, every picture decoded": """
from naign.data.format.indexing import index
begin, used = time.perf_counter(), sum(os.times()[:4])
index(sys.argv[1], to=sys.argv[2], progress=False)""",
    "boto3, bytes alone": """
import boto3
from botocore.config import Config
from concurrent.futures import ThreadPoolExecutor
bucket, _, prefix = sys.argv[1].removeprefix("s3://").partition("/")
client = boto3.client("s3", config=Config(max_pool_connections=16))
begin, used = time.perf_counter(), sum(os.times()[:4])
keys = [entry["Key"] for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for entry in page["Contents"]]
def get(key):
    body = client.get_object(Bucket=bucket, Key=key)["Body"]
    return sum(len(piece) for piece in iter(lambda: body.read(1 << 20), b""))
with ThreadPoolExecutor(8) as threads:
    assert sum(threads.map(get, keys)) > 0""",
}


@dataclass(kw_only=True)
class Settings:
    """Measure indexing."""

    to: Path
    """Where to write, without an ending."""
    shards: int = 1000
    """Tars of 10 MB."""
    repeats: int = 3
    """Runs of each."""


def tar(number: int, pictures: list[bytes]) -> bytes:
    """About SHARD bytes of samples."""
    stream, rng, size, sample = io.BytesIO(), random.Random(number), 0, 0
    with tarfile.open(fileobj=stream, mode="w") as target:
        while size < SHARD:
            data = pictures[rng.randrange(len(pictures))]
            add_sample(target, f"{number:05d}{sample:04d}", data)
            size, sample = size + len(data) + 3 * 1024, sample + 1
    return stream.getvalue()


def add_sample(target: tarfile.TarFile, key: str, data: bytes) -> None:
    """A JPEG with a caption and JSON."""
    for suffix, member in (("jpg", data), ("txt", b"a photograph"), ("json", b'{"url": "https://"}')):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(member)
        target.addfile(info, io.BytesIO(member))


def photographs() -> list[bytes]:
    """Windows of two photographs, about 500 x 400, as JPEGs."""
    found, rng = [], random.Random(0)
    for file in sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg")):
        whole = Image.open(file)
        for _ in range(20):
            width, height = rng.randrange(420, 580), rng.randrange(340, 420)
            left, top = rng.randrange(641 - width), rng.randrange(428 - height)
            stream = io.BytesIO()
            whole.crop((left, top, left + width, top + height)).save(stream, "JPEG", quality=80)
            found.append(stream.getvalue())
    return found


def main(settings: Settings) -> None:
    pictures, times = photographs(), dict[str, list[list[float]]]()
    with tempfile.TemporaryDirectory() as scratch, S3Server(scratch) as server:
        path = f"{server.bucket('theirs')}/tars"
        os.environ.update(server.environment)
        store = open_store(path)
        with ThreadPoolExecutor(2) as threads:

            def put(number: int) -> int:
                data = tar(number, pictures)
                store.put(f"{number:05d}.tar", data)
                return len(data)

            sizes = list(threads.map(put, range(settings.shards)))
        for turn in range(settings.repeats):
            for name, body in BODIES.items():
                arguments = [path, f"{scratch}/index-{turn}-{len(name)}"]
                done = subprocess.run(
                    [sys.executable, "-c", RUN.format(body=body), *arguments],
                    capture_output=True,
                    text=True,
                    cwd=ROOT,
                    check=True,
                )
                times.setdefault(name, []).append([float(word) for word in done.stdout.split()])
                print(name, done.stdout.strip(), flush=True)
    total = sum(sizes) / 1e6
    best = {name: min(wall for wall, _ in runs) for name, runs in times.items()}
    floor = best["boto3, bytes alone"]
    lines = [
        f"{settings.shards} tars of {total / settings.shards:.1f} MB from SeaweedFS on loopback",
        "",
        "| | MB/s, best | median | × boto3 | processor s a GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, runs in times.items():
        median, used = statistics.median(wall for wall, _ in runs), min(cpu for _, cpu in runs)
        speeds, cost = (f"{total / best[name]:.0f}", f"{total / median:.0f}"), f"{1000 * used / total:.1f}"
        lines.append(f"| {name} | {' | '.join(speeds)} | {floor / best[name]:.2f} | {cost} |")
    settings.to.with_suffix(".md").write_text("\n".join(lines) + "\n")
    settings.to.with_suffix(".json").write_text(json.dumps({"megabytes": total, "seconds": times}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Settings))
