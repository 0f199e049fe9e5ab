"""The nearest of 10^6 rows of 512 values to 30,000, by exact and by approximate searches.

    naign pack cifar10 --to data/cifar10
    python benchmarks/neighbours.py --threads 1 --to benchmarks/results/neighbours

Compared in the same run: the search of `naign copies`, `ShardedIndex` with inverted lists, and FAISS's exact and
approximate indexes. Rows are grey windows of 16 x 32 pixels, also mirrored, of training images, and of test images for
the queries. Candidates lie in a file: this search reads them in blocks, indexes hold all of them, and reading is not
timed for these. Each method runs in a process of its own, whose processor time and peak memory beyond the queries are
measured. Recall@1 is the share of queries with a candidate as near as the nearest, by float64 differences. HNSW (M =
32) is searched with efSearch, and lists with nprobe, doubled from 16 until recall@1 is 0.99 or more. In the columns
that are computed the number of lists grows with the root of the rows.
"""

import math
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import tyro
from output import Record, megabytes, number, page, write
from torch import Tensor

from naign import ShardedIndex
from naign.data.loader import read_split
from naign.errors import InputError, exit_on_input_error
from naign.match import Blocks, search

HEIGHT = 16
WIDTH = 32
RECALL = 0.99
"""Wanted of what is approximate."""
EFFORTS = [2**power for power in range(4, 15)]
"""Values of efSearch and nprobe to try."""
TRIED = 5000
"""Queries that they are tried on."""
BLOCK = 4096
ADDED = 1 << 18
"""Rows that indexes take at once; the first ones train lists."""
LISTS = 4096
PLANNED = (10**6, 10**8)
"""Queries and candidates that the last columns are computed for."""
TITLES = {
    "ours": "this project, exact",
    "ivf": f"ShardedIndex, IVF{LISTS},Flat, approximate",
    "flat": "IndexFlatL2, exact",
    "hnsw": "IndexHNSWFlat, approximate",
}
PARAMETERS = {"ivf": "nprobe", "hnsw": "efSearch"}


@dataclass(kw_only=True, slots=True)
class Settings:
    """Compare nearest-neighbour searches."""

    to: Path
    """Where to write, without an ending."""
    data: Path = Path("data/cifar10")
    """Packed images that windows are cut from."""
    queries: int = 30_000
    candidates: int = 10**6
    threads: int = 0
    """0: one for each core."""
    scratch: Path = Path("scratch")
    """Folder for the rows."""
    window: tuple[int, int] = (HEIGHT, WIDTH)
    """Height and width."""


def write_windows(
    file: Path,
    images: Tensor,
    count: int,
    window: tuple[int, int],
    seed: int,
) -> None:
    """Write `count` random windows of images (n, C, H, W) uint8 as rows (count, height * width) float32, grey."""
    height, width = window
    rows = images.shape[2] - height
    columns = images.shape[3] - width
    if min(rows, columns) < 0:
        raise InputError(f"images are smaller than {height}x{width}")
    file.parent.mkdir(parents=True, exist_ok=True)
    made = np.lib.format.open_memmap(
        file,
        mode="w+",
        dtype=np.float32,
        shape=(count, height * width),
    )
    draw = np.random.default_rng(seed)
    tops = draw.integers(0, rows + 1, count)
    lefts = draw.integers(0, columns + 1, count)
    turned = draw.integers(0, 2, count)
    grey = images.float().mean(1)
    for place in range(count):
        top = int(tops[place])
        left = int(lefts[place])
        cut = grey[place % len(grey), top : top + height, left : left + width]
        if turned[place]:
            cut = cut.flip(1)
        made[place] = cut.flatten()


def rows_of(file: Path) -> Any:
    """Rows (n, d) float32 that lie in a file."""
    return np.load(file, mmap_mode="r")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds over all threads of this process, and what the call returned."""
    start = time.process_time()
    answer = call()
    return time.process_time() - start, answer


def resident(kind: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"{kind}:\s+(\d+) kB", status)
    return 1024 * int(kilobytes)


def measure(
    method: str,
    asked: Path,
    pool: Path,
    least: Tensor | None,
    threads: int,
) -> tuple[Record, Tensor]:
    """In a process of its own: what a method takes, and the squared distances it found; `least` are the right ones."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    queries = torch.from_numpy(np.array(rows_of(asked)))
    candidates = rows_of(pool)
    before = resident("VmRSS")
    if method == "ours":
        blocks = Blocks(
            rows=len(candidates),
            make=lambda low, high: torch.from_numpy(candidates[low:high].copy()),
            size=BLOCK,
        )
        seconds, answer = timed(lambda: search(queries, blocks, 0))
        found = {
            "build": 0.0,
            "search": seconds,
            "recall": 1.0,
            "effort": 0,
        }
        squares = answer.distances[:, 0]
    else:
        assert least is not None
        found, squares = measure_index(method, queries, candidates, least)
    return found | {"memory": resident("VmHWM") - before}, squares


def build_index(method: str, dims: int) -> Any:
    if method == "ivf":
        return ShardedIndex(dims, factory=f"IVF{LISTS},Flat")
    if method == "hnsw":
        return faiss.IndexHNSWFlat(dims, 32)
    return faiss.IndexFlatL2(dims)


def measure_index(
    method: str,
    queries: Tensor,
    candidates: Any,
    least: Tensor,
) -> tuple[Record, Tensor]:
    index = build_index(method, queries.shape[1])
    sharded = isinstance(index, ShardedIndex)
    asked = queries if sharded else queries.numpy()
    seconds_of_parts = []
    for low in range(0, len(candidates), ADDED):
        part = np.array(candidates[low : low + ADDED])
        arguments: tuple[Any, ...] = (part,)
        if sharded:
            arguments = (torch.from_numpy(part), low)
        seconds_of_parts.append(timed(lambda: index.add(*arguments))[0])  # noqa: B023
    efforts = [0]
    if method in PARAMETERS:
        efforts = EFFORTS
    for effort in efforts:
        if method == "hnsw":
            index.hnsw.efSearch = effort
        if sharded:
            index.tune(f"nprobe={effort}")
        tried = squares_of(index.search(asked[:TRIED], 1), queries[:TRIED], candidates)
        if share_right(tried, least[:TRIED]) >= RECALL:
            break
    seconds, answer = timed(lambda: index.search(asked, 1))
    squares = squares_of(answer, queries, candidates)
    found = {
        "build": sum(seconds_of_parts),
        "trained": seconds_of_parts[0] - sum(seconds_of_parts[1:2]),
        "search": seconds,
        "recall": share_right(squares, least),
        "effort": effort,
    }
    return found, squares


def squares_of(answer: tuple[Any, Any], queries: Tensor, candidates: Any) -> Tensor:
    """Squared distances (q,) float64 of what a search found, infinite where it found nothing."""
    ids = np.asarray(answer[1])[:, 0]
    nearest = torch.from_numpy(candidates[ids.clip(min=0)])
    squares = (queries.double() - nearest.double()).square().sum(1)
    squares[torch.from_numpy(ids < 0)] = torch.inf
    return squares


def share_right(squares: Tensor, least: Tensor) -> float:
    right = squares <= least * (1 + 1e-9)
    return float(right.double().mean())


def main(settings: Settings) -> None:
    threads = settings.threads or torch.get_num_threads()
    queries = settings.scratch / f"windows-{settings.queries}-queries.npy"
    candidates = settings.scratch / f"windows-{settings.candidates}-candidates.npy"
    images = str(settings.data)
    test, _ = read_split(images, "test")
    train, _ = read_split(images, "train")
    write_windows(queries, test, settings.queries, settings.window, seed=0)
    write_windows(candidates, train, settings.candidates, settings.window, seed=1)
    records: dict[str, Record] = {}
    least: Tensor | None = None
    for method in TITLES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            running = process.submit(
                measure,
                method,
                queries,
                candidates,
                least,
                threads,
            )
            records[method], squares = running.result()
        if least is None:
            least = squares
    text = page_of(records, settings, threads)
    write(settings.to, text, {"threads": threads, "methods": records})
    print(text)


def page_of(
    records: dict[str, Record],
    settings: Settings,
    threads: int,
) -> str:
    rows = []
    for method, record in records.items():
        title = TITLES[method]
        if record["effort"]:
            title += f" ({PARAMETERS[method]} {record['effort']})"
        cells = [
            f"{number(record['build'])} s",
            f"{number(record['search'])} s",
            f"{record['recall']:.4f}",
            megabytes(record["memory"]),
        ]
        for count in PLANNED:
            cells.append(f"{number(planned(method, record, settings, count) / 3600)} h")
        rows.append([title, *cells])
    values = settings.window[0] * settings.window[1]
    title = f"""\
{settings.queries:,} x {settings.candidates:,} rows of {values} values, {threads} threads. Times are processor time. The
last columns are computed: so many queries, and as many rows, build and search."""
    columns = [f"{count:,}" for count in PLANNED]
    return page(title, ["search", "build", "search", "recall@1", "memory", *columns], rows)


def planned(
    method: str,
    record: Record,
    settings: Settings,
    count: int,
) -> float:
    """Processor seconds for `count` queries and rows. Exact searches grow with the pairs; a graph is built by row and
    asked by query; of lists, as many more as the root of the rows, k-means compares all with as many rows each.
    """
    more_queries = count / settings.queries
    more_candidates = count / settings.candidates
    if method == "ivf":
        more_lists = math.sqrt(more_candidates)
        filled = (record["build"] - record["trained"]) * more_candidates * more_lists
        return float(record["trained"] * more_lists**2 + filled + record["search"] * more_queries * more_lists)
    if method == "hnsw":
        return float(record["build"] * more_candidates + record["search"] * more_queries)
    return float(record["build"] + record["search"] * more_queries * more_candidates)


if __name__ == "__main__":
    with exit_on_input_error("neighbours"):
        main(tyro.cli(Settings))
