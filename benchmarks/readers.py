"""The readers that data.py compares, each run in a process of its own: `python readers.py NAME JOB`, JOB being JSON.

A reader imports what it needs and returns a function. Only what that function's iterator does is timed, imports are
not. So this file runs in any Python that has NumPy and the reader's own packages.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CROP = 64
"""Pixels a side of random windows, where a job asks for them."""
Read = Callable[[], Iterator[tuple[int, Any]]]
"""Gives numbers of images and their uint8 pixels."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """What to read."""

    path: str
    """Folder or s3://bucket of the tars, or of what was made from them for another reader."""
    local: str
    """The same tars in a folder."""
    shards: list[str]
    images: int
    round: int
    """Images that ours returns at once; it divides `images`."""
    suffix: str
    """png or jpg."""
    grey: bool
    crop: bool
    """Return the largest central window, resized to CROP pixels."""
    aws: str = "aws"
    """AWS's program, for pipes."""
    summed: bool = False
    """Also return the sum of all pixels, which takes time."""


def ours(job: Job) -> Read:
    import boto3  # noqa: F401  # else its import, at the first request, would be timed

    from naign.data.dataset import DataConfig
    from naign.data.loader import Stream
    from naign.distributed.host import keep_memory

    keep_memory()  # as the training program does
    config = DataConfig(path=job.path, split="train", workers=1)
    if job.crop:
        config.size = str(CROP)

    def read() -> Iterator[tuple[int, Any]]:
        with Stream(config, seed=0, round_size=job.round) as stream:
            for number in range(job.images // job.round):
                images = stream.take(number).images
                yield len(images), images.numpy()

    return read


def webdataset(job: Job) -> Read:
    """Local files, or s3:// by the pipe of its documentation."""
    urls = [f"{job.path}/{shard}" for shard in job.shards]
    if job.path.startswith("s3://"):
        urls = [f"pipe:{job.aws} s3 cp {url} -" for url in urls]
    return _webdataset(job, urls)


def webdataset_ours(job: Job) -> Read:
    """s3:// by this project's stores."""
    import boto3  # noqa: F401  # see `ours`
    from webdataset import gopen_schemes

    from naign import gopen

    gopen_schemes["s3"] = gopen
    return _webdataset(job, [f"{job.path}/{shard}" for shard in job.shards])


def _webdataset(job: Job, urls: list[str]) -> Read:
    import PIL.Image  # noqa: F401  # its decoder imports it at the first image
    from webdataset import WebDataset

    finish = pixels_of(job)
    kind = "pill" if job.grey else "pilrgb"

    def read() -> Iterator[tuple[int, Any]]:
        dataset = WebDataset(urls, shardshuffle=False).decode(kind)
        for (picture,) in dataset.to_tuple(job.suffix):
            yield 1, finish(picture)

    return read


def mosaic(job: Job) -> Read:
    """mosaicml-streaming, which may fetch the whole set ahead: its default polls more often and is slower."""
    from PIL import Image
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    finish = pixels_of(job)

    def read() -> Iterator[tuple[int, Any]]:
        with tempfile.TemporaryDirectory() as cache:
            where = {"local": job.path}
            if job.path.startswith("s3://"):
                where = {"remote": job.path, "local": cache}
            dataset = StreamingDataset(
                **where,
                shuffle=False,
                batch_size=256,
                predownload=job.images,
            )
            for sample in dataset:
                picture = Image.open(io.BytesIO(sample["image"]))
                yield 1, finish(picture)

    return read


def write_mosaic(job: Job) -> Read:
    """Not a reader: writes the tars' images, byte for byte, as MDS shards to `path`."""
    from streaming import MDSWriter

    size = sum(len(data) for data in encoded(job))
    shard = max(1 << 16, size // len(job.shards))

    def read() -> Iterator[tuple[int, Any]]:
        columns = {"image": "bytes"}
        with MDSWriter(out=job.path, columns=columns, size_limit=shard) as writer:
            for data in encoded(job):
                writer.write({"image": data})
                yield 1, None

    return read


def pixels_of(job: Job) -> Callable[[Any], Any]:
    """Turns a picture of Pillow into pixels, of its central window, resized, if the job asks for it."""
    if not job.crop:
        return np.asarray
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    crop = Compose([Resize(CROP, interpolation=InterpolationMode.BICUBIC), CenterCrop(CROP)])
    return lambda picture: np.asarray(crop(picture.convert("RGB")))


def encoded(job: Job) -> Iterator[bytes]:
    """The encoded images of the tars."""
    for shard in job.shards:
        with tarfile.open(Path(job.local) / shard) as tar:
            for member in tar:
                if member.name.endswith(job.suffix):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    yield stream.read()


READERS: dict[str, Callable[[Job], Read]] = {
    "ours": ours,
    "WebDataset": webdataset,
    "WebDataset, our `s3://`": webdataset_ours,
    "mosaicml-streaming": mosaic,
    "write mosaicml-streaming": write_mosaic,
}


def main(name: str, job: Job) -> dict[str, float]:
    """Seconds and processor seconds from the start of reading to the last image, and the sum of all pixels."""
    read = READERS[name](job)
    used = sum(os.times()[:4])
    begin = time.perf_counter()
    images = 0
    total = 0
    for count, pixels in read():
        images += count
        if job.summed and pixels is not None:
            assert pixels.dtype == np.uint8, pixels.dtype
            total += int(pixels.sum(dtype=np.int64))
    seconds = time.perf_counter() - begin
    assert images == job.images, f"{name}: {images} of {job.images} images"
    cpu = sum(os.times()[:4]) - used
    return {"seconds": seconds, "cpu": cpu, "sum": total}


def run(
    name: str,
    job: Job,
    python: str,
    environment: dict[str, str],
) -> dict[str, float]:
    """`main` in a fresh process. Raises RuntimeError with the end of its output if it fails."""
    asked = json.dumps(asdict(job))
    command = [python, os.path.abspath(__file__), name, asked]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} on {job.path} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    last = done.stdout.splitlines()[-1]
    return dict(json.loads(last))


if __name__ == "__main__":
    asked = Job(**json.loads(sys.argv[2]))
    print(json.dumps(main(sys.argv[1], asked)))
