"""The exact match is 0.9 to 16 times as fast as faiss.knn on two cores, and its answers are right.

    naign pack mnist --to data/mnist && naign pack cifar10 --to data/cifar10    # data/photos64: patches.py says how
    accelerate launch pipeline/train.py
    for set in cifar10:250_000 photos64:60_000; do accelerate launch pipeline/train.py --model.code=256 \
        --data.path=data/${set%:*} --run.path=runs/${set%:*} --train.images=${set#*:}; done
    python benchmarks/match.py --to benchmarks/results/match

Compared in the same run: this project's search, faiss.knn, FAISS's HNSW index (M 32, efConstruction 40, efSearch 64)
and IndexFlatL2Panorama (32 levels, after a rotation by principal directions), which is exact and skips rows early.
Every method answers the same problem in one process, in turns, and its best run counts. Building an index counts,
since the pool is new each round. An answer is wrong if its id is not that of the least (float64 sum of squared
differences, id). Problems that match.json holds stay unless they are measured again.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from naign.errors import InputError, exit_on_input_error  # first: sets OMP_WAIT_POLICY before OpenMP is loaded

# isort: split
import faiss
import torch
import tyro
from output import Record, command, machine, number, say, stored, table, write
from torch import Tensor

from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.distributed.host import keep_memory
from naign.match import search
from naign.model.naign import NAIGN, read_settings
from naign.model.networks import build_network

Kind = Literal["natural", "trained", "untrained"]
"""Test images among training images; training images among samples f(z) of a run, or of its network before training."""
SETS = {64: "digits", 784: "mnist", 3072: "cifar10", 12288: "photos64"}
"""Name of the data set, and of the run trained on it, by the values of an image."""
METHODS = ("faiss.knn", "HNSW", "Panorama", "auto")
"""auto is this project's search."""
BLOCK = 4096


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure the match beside FAISS."""

    to: Path
    """Where to write, without an ending."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """What is searched for what."""
    dims: tuple[int, ...] = (784, 3072, 12288)
    """Values of an image, which name the data: 784 mnist, 3072 cifar10, 12288 photos64, 64 digits."""
    queries: int = 12_000
    """At most."""
    candidates: int = 60_000
    """At most."""
    most: int = 250_000_000
    """Candidate values for HNSW: larger problems are measured without it."""
    products: float = 1e12
    """Multiply-adds for Panorama, likewise."""
    checked: int = 1_000
    """Queries whose answers are compared with the right ones."""
    threads: int = 0
    """0: this machine's cores."""
    repeats: int = 3
    """Runs of each method, of which the best counts."""
    data: Path = Path("data")
    """Folder of packed data sets."""
    runs: Path = Path("runs")
    """Folder of runs."""


def main(settings: Settings) -> None:
    unknown = set(settings.dims) - set(SETS)
    if unknown:
        raise InputError(f"no data set has images of {min(unknown)} values: choose --dims of {tuple(SETS)}")
    here = machine()
    here["threads"] = settings.threads or here["cores"]
    torch.set_num_threads(here["threads"])
    keep_memory()  # as training does
    faiss.omp_set_num_threads(here["threads"])
    results = stored(settings.to, dict)
    if not results:
        results = {"machine": here, "problems": {}}
    if results["machine"] != here:
        raise InputError(f"{settings.to}.json was measured on another machine: write --to another place")
    for kind in settings.kinds:
        for dims in settings.dims:
            problem = measure(kind, dims, settings)
            results["problems"][f"{kind} {dims} x {problem['candidates']}"] = problem
            write(settings.to, page(results), results)
    print(page(results))


def measure(
    kind: Kind,
    dims: int,
    settings: Settings,
) -> Record:
    """One problem by all methods."""
    queries, candidates = problem_of(kind, SETS[dims], settings)
    say(f"{kind}, {dims} values: {len(queries)} x {len(candidates)}")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(queries), generator=generator)
    looked = order[: settings.checked]
    right = right_answers(queries[looked], candidates)
    methods = list(METHODS)
    if candidates.numel() > settings.most:
        methods.remove("HNSW")
    if candidates.numel() * len(queries) > settings.products:
        methods.remove("Panorama")
    best: dict[str, Record] = {}
    for _ in range(settings.repeats):
        for method in methods:
            begin = time.perf_counter()
            ids = answer(method, queries, candidates)
            seconds = time.perf_counter() - begin
            misses = ids[looked] != right
            wrong = float(misses.double().mean())
            say(f"  {method}: {seconds:.2f} s, {100 * wrong:.2f} % wrong")
            record = best.setdefault(method, {"seconds": seconds, "wrong": wrong})
            record["seconds"] = min(seconds, record["seconds"])
            record["wrong"] = max(wrong, record["wrong"])
    return {
        "kind": kind,
        "dims": dims,
        "queries": len(queries),
        "candidates": len(candidates),
        "checked": len(looked),
        "methods": best,
    }


def problem_of(
    kind: Kind,
    name: str,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Queries (q, d) and candidates (c, d) float32. Raises InputError if the data or the run is missing."""
    path = str(settings.data / name)
    if kind == "natural":
        queries = images_of(path, "test", settings.queries)
        return queries, images_of(path, "train", settings.candidates)
    model = NAIGN.from_pretrained(settings.runs / name)
    if kind == "untrained":
        torch.manual_seed(0)
        network = build_network(read_settings("model", model.metadata["model"]), model.shape)
        model = NAIGN(network, model.metadata, model.state)
    samples = torch.empty(settings.candidates, *model.shape)
    for ids in torch.arange(settings.candidates).split(512):
        samples[ids] = model.project(model.latent(ids))
    return images_of(path, "train", settings.queries), samples.flatten(1)


def images_of(path: str, split: str, most: int) -> Tensor:
    """The first images of a split as rows in [-1, 1]."""
    images, _ = read_split(path, split, limit=most)
    return scaled(images).flatten(1)


def answer(method: str, queries: Tensor, candidates: Tensor) -> Tensor:
    """The ids (q,) that a method finds."""
    if method == "auto":
        return search(queries, candidates, 0).ids[:, 0]
    if method == "faiss.knn":
        _, ids = faiss.knn(queries.numpy(), candidates.numpy(), 1)
        return torch.from_numpy(ids[:, 0])
    dims = candidates.shape[1]
    if method == "Panorama":
        rotation = faiss.PCAMatrix(dims, dims)
        index = faiss.IndexPreTransform(rotation, faiss.IndexFlatL2Panorama(dims, 32))
        index.train(candidates[:: len(candidates) // 5000 + 1].numpy())
    else:
        index = faiss.IndexHNSWFlat(dims, 32)
        index.hnsw.efConstruction = 40
        index.hnsw.efSearch = 64
    index.add(candidates.numpy())
    _, ids = index.search(queries.numpy(), 1)
    return torch.from_numpy(ids[:, 0])


def right_answers(queries: Tensor, candidates: Tensor) -> Tensor:
    """The id (q,) int64 of each query's nearest candidate by (float64 sum of squared differences, id).

    A float64 matrix product, with a bound of its error, leaves a few candidates; their differences decide.
    """
    centre = candidates.mean(0, dtype=torch.float64)
    near = queries.double() - centre
    least = torch.full([len(queries)], torch.inf, dtype=torch.float64)
    best = torch.zeros(len(queries), dtype=torch.int64)
    for first in range(0, len(candidates), BLOCK):
        part = candidates[first : first + BLOCK].double()
        far = part - centre
        near_sizes = near.square().sum(1)
        sizes = near_sizes[:, None] + far.square().sum(1)
        error = 8 * (near.shape[1] + 8) * 2.0**-53 * sizes
        distances = sizes - 2 * near @ far.T
        nearest = (distances + error).min(1).values
        limit = torch.minimum(nearest, least)
        left = (distances - error <= limit[:, None]).nonzero()
        for row, column in left.tolist():  # ascending ids: of equals the first is kept
            difference = queries[row].double() - part[column]
            exact = difference.square().sum()
            if exact < least[row]:
                least[row] = exact
                best[row] = first + column
    return best


def place(problem: Record) -> tuple[int, int, int]:
    """Of a problem in the table."""
    kind = get_args(Kind).index(problem["kind"])
    return kind, problem["dims"], problem["candidates"]


def page(results: Record) -> str:
    problems = list(results["problems"].values())
    problems.sort(key=place)
    looked = min(problem["checked"] for problem in problems)
    rows = []
    for problem in problems:
        size = f"{problem['queries']:,} x {problem['candidates']:,}"
        cells = [f"{problem['kind']}, {problem['dims']:,}: {size}"]
        base = problem["methods"]["faiss.knn"]["seconds"]
        for method in METHODS:
            found = problem["methods"].get(method)
            if found is None:
                cells.append("")
                continue
            text = f"{number(found['seconds'])} s ({number(base / found['seconds'])}x)"
            if found["wrong"]:
                text += f", {number(100 * found['wrong'])} % wrong"
            cells.append(text)
        rows.append(cells)
    here = results["machine"]
    return f"""Seconds to find the nearest candidate of each query, and how many times faster than `faiss.knn`.

{command()} on {here["processor"]}, {here["threads"]} threads. HNSW and Panorama count with their build.

The answers to at least {looked:,} random queries of each problem were compared with float64 differences; none was wrong
where the table does not say so.

{table(["data, values: queries x candidates", "faiss.knn", "HNSW", "Panorama", "this search"], rows)}
"""


if __name__ == "__main__":
    with exit_on_input_error("match"):
        main(tyro.cli(Settings))
