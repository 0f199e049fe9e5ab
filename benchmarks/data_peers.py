"""The contenders of data.py, each run in a process of its own: `python data_peers.py CONTENDER JOB`, JOB being JSON.

A contender imports what it needs and gives back a function; what that function's iterator takes from its first item to
its last is measured, imports are not. So this file runs in any Python that has NumPy and the contender's own packages.
"""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from data_job import Item, Job, Read, Record, tar_samples
from data_libraries import READERS, WRITERS

CHUNK = 1 << 20
"""Bytes read at once where only bytes are read."""


def main(name: str, job: Job) -> Record:
    """Seconds, CPU seconds of this process and its children, bytes, images, and how much memory grew at most."""
    read = CONTENDERS[name](job)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
    before, cpu, start = status("VmRSS"), cpu_seconds(), time.perf_counter()
    images = size = pixels = 0
    end = start
    for count, bytes_read, array in read():
        images, size, end = images + count, size + bytes_read, time.perf_counter()
        assert array is None or array.dtype == np.uint8, array.dtype
        if job.summed and array is not None:
            pixels += int(array.sum(dtype=np.int64))
    return {
        "seconds": end - start,
        "cpu": cpu_seconds() - cpu,
        "images": images,
        "bytes": size or job.bytes,
        "memory": status("VmHWM") - before,
        "sum": pixels,
    }


def status(field: str) -> int:
    """VmRSS or VmHWM of this process, the resident set and its peak, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


# Images.


def ours(job: Job, *, check: bool = True) -> Read:
    import boto3  # noqa: F401  # else its import, at the first request, would be measured

    from naign.data.dataset import DataConfig
    from naign.data.loader import Stream
    from naign.distributed.host import keep_memory

    keep_memory()  # as the training program does

    def read() -> Iterator[Item]:
        config = DataConfig(path=job.path, split="train", workers=job.workers, check=check)
        with Stream(config, seed=0, round_size=job.round) as stream:
            for round in range(job.images // job.round):
                taken = stream.take(round)
                yield len(taken.keys), taken.tally.bytes, taken.images.numpy()

    return read


def ours_unchecked(job: Job) -> Read:
    return ours(job, check=False)


def webdataset(job: Job) -> Read:
    """Plain WebDataset on local files, and for s3:// with the AWS program's pipe, as its documentation has it."""
    if job.path.startswith("s3://"):
        return _webdataset(job, [f"pipe:{job.aws} s3 cp {job.path}/{shard} -" for shard in job.shards])
    return _webdataset(job, [f"{job.path}/{shard}" for shard in job.shards])


def webdataset_ours(job: Job) -> Read:
    """Plain WebDataset that opens s3:// by this project's stores."""
    import boto3  # noqa: F401  # see `ours`
    from webdataset import gopen_schemes

    from tests.streams import gopen

    gopen_schemes["s3"] = gopen
    return _webdataset(job, [f"{job.path}/{shard}" for shard in job.shards])


def _webdataset(job: Job, urls: list[str]) -> Read:
    import PIL.Image  # noqa: F401  # its decoder imports it at the first image
    from webdataset import WebDataset

    def read() -> Iterator[Item]:
        dataset = WebDataset(urls, shardshuffle=False).decode("l8" if job.grey else "rgb8")
        for image, _ in dataset.to_tuple(job.suffix, "cls"):
            yield 1, 0, image

    return read


def decode(job: Job) -> Read:
    """No fetching: Pillow alone, from memory; of all images here, or of equal parts in as many processes."""
    from PIL import Image

    encoded = _encoded(job)

    def read() -> Iterator[Item]:
        for data in encoded:
            yield 1, len(data), np.asarray(Image.open(io.BytesIO(data)))

    return read


def simplejpeg(job: Job) -> Read:
    """No fetching: the decoder that ours has for JPEG, from memory."""
    import simplejpeg

    encoded = _encoded(job)

    def read() -> Iterator[Item]:
        for data in encoded:
            yield 1, len(data), simplejpeg.decode_jpeg(data)

    return read


def decode_parts(job: Job) -> Read:
    encoded = _encoded(job)
    context = get_context("fork")
    ready = context.Barrier(job.workers + 1)
    results: Any = context.SimpleQueue()

    def part(number: int) -> None:
        from PIL import Image

        ready.wait()
        count = size = 0
        for data in encoded[number :: job.workers]:
            array = np.asarray(Image.open(io.BytesIO(data)))
            count, size = count + int(array.dtype == np.uint8), size + len(data)
        results.put((count, size))

    processes = [context.Process(target=part, args=(number,)) for number in range(job.workers)]
    for process in processes:
        process.start()

    def read() -> Iterator[Item]:
        ready.wait()
        for _ in processes:
            count, size = results.get()
            yield count, size, None
        for process in processes:
            process.join()

    return read


def _encoded(job: Job) -> list[bytes]:
    return [data for data, _ in tar_samples(job)]


# Bytes.


def ours_bytes(job: Job, *, hashed: bool = False) -> Read:
    import boto3  # noqa: F401  # see `ours`

    from naign.distributed.host import keep_memory
    from naign.storage.store import open_store

    keep_memory()

    def read() -> Iterator[Item]:
        store = open_store(job.path)
        for shard in job.shards:
            digest = hashlib.sha256()
            for data in store.pieces(shard):
                if hashed:
                    digest.update(data)
                yield 0, len(data), None

    return read


def ours_hashed(job: Job) -> Read:
    return ours_bytes(job, hashed=True)


def boto3_bytes(job: Job, *, hashed: bool = False) -> Read:
    import boto3

    def read() -> Iterator[Item]:
        client = boto3.session.Session().client("s3")
        for shard in job.shards:
            digest = hashlib.sha256()
            for data in client.get_object(Bucket=job.path.removeprefix("s3://"), Key=shard)["Body"].iter_chunks(CHUNK):
                if hashed:
                    digest.update(data)
                yield 0, len(data), None

    return read


def boto3_hashed(job: Job) -> Read:
    return boto3_bytes(job, hashed=True)


def run(name: str, job: Job, python: str, environment: dict[str, str]) -> Record:
    """`main` in a fresh process. Raises RuntimeError with the end of what it said if it fails."""
    command = [python, os.path.abspath(__file__), name, json.dumps(asdict(job))]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} on {job.path} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


CONTENDERS: dict[str, Callable[[Job], Read]] = {
    "ours": ours,
    "ours, unchecked": ours_unchecked,
    "webdataset": webdataset,
    "webdataset, our s3://": webdataset_ours,
    **READERS,
    "decode": decode,
    "decode, parts": decode_parts,
    "simplejpeg": simplejpeg,
    **{f"write {name}": write for name, write in WRITERS.items()},
    "ours, bytes": ours_bytes,
    "ours, bytes and sha256": ours_hashed,
    "boto3": boto3_bytes,
    "boto3 and sha256": boto3_hashed,
}

if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Job(**json.loads(sys.argv[2])))))
