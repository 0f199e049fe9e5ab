"""The exact search of `naign copies` and `naign duplicates` beside FAISS's exact and approximate indexes.

    naign pack cifar10 --to data/cifar10
    python benchmarks/neighbours.py --to benchmarks/results/neighbours

finds the nearest of 10^6 rows for each of 10^5, both of 512 values: grey windows of 16x32 pixels, also mirrored, of
training images, and of test images for the queries. Candidates lie in a file. The search of this project reads them in
blocks; FAISS's indexes hold all of them, and reading them is not timed. Each method runs in a process of its own, whose
processor time over all threads and peak memory beyond the queries are measured. Recall@1 is the share of queries for
which a candidate is found that is as near as the nearest, by float64 differences.

HNSW (M = 32) is searched with efSearch doubled from 16 until recall@1 is 0.99 or more.
"""

import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import tyro
from match_data import number, read_rows, rows_of, size, write_rows
from torch import Tensor
from trained import page, write

from naign.data.loader import read_split
from naign.errors import exit_on_input_error, require
from naign.match import Blocks, search

RECALL, MOST = 0.99, 1 << 14  # wanted of HNSW, and the largest efSearch
BLOCK = 4096
PLANNED = 10**6, 10**6  # queries and candidates that the last columns are extrapolated to


@dataclass(kw_only=True, slots=True)
class Settings:
    """Compare nearest-neighbour searches."""

    to: Path
    """Where to write, without an ending."""
    data: Path = Path("data/cifar10")
    """Packed images that windows are cut from."""
    queries: int = 10**5
    candidates: int = 10**6
    window: tuple[int, int] = (16, 32)
    """Height and width."""
    threads: int = 0
    """0: one for each core."""
    scratch: Path = Path("scratch")
    """Folder for the rows."""
    quick: bool = False
    """2,000 queries and 20,000 candidates."""


def windows(images: Tensor, count: int, window: tuple[int, int], seed: int) -> Iterator[Tensor]:
    """`count` random windows of images (n, C, H, W) uint8 as rows (b, height * width) float32, grey, in levels."""
    draw, (height, width) = np.random.default_rng(seed), window
    require((min(images.shape[2] - height, images.shape[3] - width) >= 0, f"images are smaller than {height}x{width}"))
    for low in range(0, count, BLOCK):
        some = range(low, min(low + BLOCK, count))
        tops = draw.integers(0, images.shape[2] - height + 1, len(some))
        lefts, turns = draw.integers(0, images.shape[3] - width + 1, len(some)), draw.integers(0, 2, len(some))
        cut = [
            images[place % len(images), :, top : top + height, left : left + width].float().mean(0)
            for place, top, left in zip(some, tops.tolist(), lefts.tolist(), strict=True)
        ]
        yield torch.stack([one.flip(1) if turn else one for one, turn in zip(cut, turns, strict=True)]).flatten(1)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds over all threads of this process, and what it returned."""
    start = time.process_time()
    answer = call()
    return time.process_time() - start, answer


def resident(kind: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far (Linux)."""
    return 1024 * int(re.findall(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def distances(queries: Tensor, pool: Path, ids: Tensor) -> Tensor:
    """Squared distances (q,) float64 of queries to the candidates of these ids; -1 is none, and infinitely far."""
    rows = torch.from_numpy(np.load(pool, mmap_mode="r")[ids.clamp(min=0).numpy()])
    squares = (queries.double() - rows.double()).square().sum(1)
    return torch.where(ids < 0, torch.inf, squares)


def measure(method: str, asked: Path, pool: Path, least: Tensor | None, threads: int) -> tuple[dict[str, Any], Tensor]:
    """In a process of its own: processor seconds to build and search, peak memory beyond the queries, recall; and the
    squared distances of what was found, of which `least` are the right ones.
    """
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    queries, count = read_rows(asked, 0, rows_of(asked)), rows_of(pool)
    build, effort, recall, before = 0.0, 8 if method == "hnsw" else 0, 1.0, resident("VmRSS")
    if method == "ours":
        blocks = Blocks(rows=count, make=lambda low, high: read_rows(pool, low, high), size=BLOCK)
        seconds, answer = timed(lambda: search(queries, blocks, 0))
        squares = answer.distances[:, 0]
    else:
        index = faiss.IndexFlatL2(queries.shape[1]) if method == "flat" else faiss.IndexHNSWFlat(queries.shape[1], 32)
        for low in range(0, count, 1 << 16):
            part = read_rows(pool, low, min(low + (1 << 16), count)).numpy()
            build += timed(lambda part=part: index.add(part))[0]  # type: ignore[misc]
        while True:
            effort *= 2
            if effort:
                index.hnsw.efSearch = effort
            seconds, (_, ids) = timed(lambda: index.search(queries.numpy(), 1))
            squares = distances(queries, pool, torch.from_numpy(ids[:, 0]))
            recall = float((squares <= least * (1 + 1e-9)).double().mean())
            if recall >= RECALL or effort in (0, MOST):
                break
    peak = resident("VmHWM") - before
    return {"build": build, "search": seconds, "memory": peak, "recall": recall, "effort": effort}, squares


TITLES = {"ours": "this project, exact", "flat": "IndexFlatL2, exact", "hnsw": "IndexHNSWFlat, approximate"}


def main(settings: Settings) -> None:
    if settings.quick:
        settings.queries, settings.candidates = 2_000, 20_000
    threads = settings.threads or torch.get_num_threads()
    values = settings.window[0] * settings.window[1]
    files = [settings.scratch / f"windows-{settings.queries}-queries.npy"]
    files.append(settings.scratch / f"windows-{settings.candidates}-candidates.npy")
    for seed, (file, split) in enumerate(zip(files, ("test", "train"), strict=True)):
        images, count = read_split(str(settings.data), split)[0], (settings.queries, settings.candidates)[seed]
        write_rows(file, windows(images, count, settings.window, seed), count, values)
    records, least = dict[str, dict[str, Any]](), None
    for method in TITLES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            records[method], squares = process.submit(measure, method, *files, least, threads).result()
        least = squares if least is None else least
    more = PLANNED[0] * PLANNED[1] / (settings.queries * settings.candidates)
    rows = [
        [
            TITLES[method] + (f" (efSearch {record['effort']})" if record["effort"] else ""),
            *(f"{number(record[name])} s" for name in ("build", "search")),
            f"{record['recall']:.4f}",
            size(record["memory"]),
            f"{number(planned(method, record, settings, more) / 3600)} h",
        ]
        for method, record in records.items()
    ]
    title = f"{settings.queries:,} x {settings.candidates:,} rows of {values} values, {threads} threads. "
    title += f"Times are processor time, over all threads. The last column is computed, not measured: {PLANNED[0]:,} x "
    title += f"{PLANNED[1]:,}, build and search."
    text = page(title, ["search", "build", "search", "recall@1", "memory", "planned"], rows)
    write(settings.to, text, {"threads": threads, "values": values, "methods": records})
    print(text)


def planned(method: str, record: dict[str, Any], settings: Settings, more: float) -> float:
    """Processor seconds for PLANNED. Exact searches grow with the pairs; a graph is built by row and asked by query."""
    if method != "hnsw":
        return float(record["build"] + record["search"] * more)
    builds, asked = PLANNED[1] / settings.candidates, PLANNED[0] / settings.queries
    return float(record["build"] * builds + record["search"] * asked)


if __name__ == "__main__":
    with exit_on_input_error("neighbours"):
        main(tyro.cli(Settings))
