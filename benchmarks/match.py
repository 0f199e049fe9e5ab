"""Exact, and several times faster than a flat index: the search that matches images to samples, beside its peers.

    naign pack mnist --to data/mnist && naign pack cifar10 --to data/cifar10     # data/photos64: match_data.py says how
    accelerate launch pipeline/train.py
    for set in cifar10:250_000 photos64:60_000; do accelerate launch pipeline/train.py --model.code=256 \
        --data.path=data/${set%:*} --run.path=runs/${set%:*} --train.images=${set#*:}; done
    python benchmarks/match.py --to benchmarks/results/match

prints and writes three tables (match.md) and all that was measured (match.json). Problems that match.json holds already
stay unless they are measured again: `--kinds natural --dims 784` adds to it.

One process: every method answers the same problem, in turns, and its best run counts. What must be built counts too,
as the pool is new each round. `sgemm` is the floor of a flat search: its float32 matrix product alone. An answer is
wrong if its id is not that of the least (float64 sum of squared differences, id).

Several ranks: gloo processes of one thread. Ours makes its candidates in blocks (read from a file), so that it never
holds the pool; the peers' way gathers the pool on every rank and searches it with the rank's own queries by
IndexFlatL2. Memory is what a rank's resident set grew by at most from before the search, queries there already, to its
end. Seconds, memory and bytes are those of the rank that had the most.

More ranks than were measured: Q queries of all ranks, q of one; m candidates of one of W ranks; d values.

    seconds  = a Q m + b (Q + m) + c          on one thread, without exchange
    memory   = u Q + v min(m, block) + w      the queries of all ranks, and a block of candidates
    received = (4 d + 2 p + 26) (Q - q) + 16 (s + 1) Q (W - 1) / W + 16 q (W - 1)
                                              bytes: the others' queries and what they are projected to (p bfloat16
                                              coordinates, the rest's, three float64), limits at the start and after
                                              each of s blocks of candidates, and the others' answers to one's own

a, b, c are fitted on one rank's problems of four sizes and checked on two others, one of them what each of 8 ranks has
to do; u, v, w are fitted on two ranks' problems of three sizes and checked on another and on more ranks; the bytes are
not fitted.
"""

import itertools
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from naign.errors import InputError, exit_on_input_error  # first: sets OMP_WAIT_POLICY before OpenMP is loaded

# isort: split
import faiss
import numpy as np
import torch
import tyro
from match_data import SETS, WORLDS, Case, Kind, Method, Record, page, prepare, read_rows, right_answers, rows_of
from match_ranks import CHUNK, Job, on_ranks
from scipy.optimize import nnls  # type: ignore[import-untyped]
from torch import Tensor

from naign.match.across_ranks import search

FITTED = ((1, 1), (0.5, 1), (1, 0.25), (0.25, 0.25))
CHECKED = ((1, 0.125), (0.5, 0.5))
STORED = ((1, 1), (0.25, 1), (1, 0.0625))
HALF = (0.5, 1)
"""Shares of the queries and of the candidates: seconds are fitted and checked on them, then memory."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# One process.


def answer(method: Method, queries: Tensor, candidates: Tensor) -> tuple[Record, Tensor | None]:
    """Seconds, and what else is known of the run; the ids (q,) found, but of `sgemm`, which finds nothing."""
    near, far = queries.numpy(), candidates.numpy()
    record: Record = {}
    ids = None
    start = time.perf_counter()
    match method:
        case "sgemm":
            out = torch.empty(len(queries) * CHUNK)
            for part in candidates.split(CHUNK):
                torch.mm(queries, part.T, out=out[: len(queries) * len(part)].view(len(queries), len(part)))
        case "faiss.knn":
            ids = torch.from_numpy(faiss.knn(near, far, 1)[1][:, 0])
        case "cdist":
            best, ids = torch.full((len(queries),), math.inf), torch.zeros(len(queries), dtype=torch.int64)
            for number, part in enumerate(candidates.split(CHUNK)):
                distances, columns = torch.cdist(queries, part).min(1)
                nearer = distances < best
                best[nearer], ids[nearer] = distances[nearer], columns[nearer] + number * CHUNK
        case "IndexFlatL2" | "HNSW":
            index: Any = faiss.index_factory(far.shape[1], "HNSW32" if method == "HNSW" else "Flat")
            if method == "HNSW":
                index.hnsw.efConstruction, index.hnsw.efSearch = 40, 64
            index.add(far)
            record["build"] = time.perf_counter() - start
            ids = torch.from_numpy(index.search(near, 1)[1][:, 0])
        case _:
            found = search(queries, candidates, 0, method=method)
            ids = found.ids[:, 0]
            record |= {"exchange": found.exchange, "measured": found.measured, "method": found.method}
    return {"seconds": time.perf_counter() - start} | record, ids


def compare(
    queries: Tensor,
    candidates: Tensor,
    methods: list[Method],
    rows: Tensor,  # (n,) int64: queries whose answers are looked at
    right: Tensor,  # (n,) int64: their right answers
    repeats: int,
    budget: float,  # seconds after which a method is not run again
) -> dict[str, Record]:
    """Each method's best run, with the share of wrong answers of its worst."""
    best: dict[str, Record] = {}
    spent = dict.fromkeys(methods, 0.0)
    for _ in range(repeats):
        for method in (method for method in methods if spent[method] <= budget):
            record, ids = answer(method, queries, candidates)
            spent[method] += record["seconds"]
            old = best.get(method, record)
            wrong = float((ids[rows] != right).double().mean()) if ids is not None else 0.0
            record["wrong"] = max(wrong, old.get("wrong", 0.0))
            best[method] = min(record, old, key=lambda record: float(record["seconds"])) | {"wrong": record["wrong"]}
            say(f"  {method}: {record['seconds']:.2f} s, {100 * wrong:.2f} % wrong")
    return best


# Several ranks.


def measure_ranks(
    case: Case, queries: int, candidates: int, worlds: tuple[int, ...], rows: Tensor, right: Tensor, *limits: Any
) -> tuple[dict[str, dict[str, Record]], Record]:
    """By world size: ours and the peers'; and the model of more ranks, as far as the worlds allow one."""
    measured: dict[str, dict[str, Record]] = {}
    sized: dict[Any, Record] = {}
    for world in worlds:
        jobs = [Job(method=method, queries=queries, candidates=candidates) for method in ("auto", "peers")]
        shares = {1: (*FITTED[1:], *CHECKED), 2: (*STORED[1:], HALF)}.get(world, ())
        jobs += [Job(method="auto", queries=int(queries * a), candidates=int(candidates * b)) for a, b in shares]
        found = on_ranks(world, case, jobs, *limits)
        for record in found[:2]:
            record["wrong"] = float((torch.from_numpy(record["ids"])[rows] != right).double().mean())
        measured[str(world)] = {"auto": found[0], "peers": found[1]}
        sized |= {(world, *share): record for share, record in zip(shares, found[2:], strict=True)}
        sized[world, 1, 1] = found[0]
        for record in found:
            del record["ids"]
        say(f"  {world} ranks: ours {found[0]['seconds']:.2f} s, the peers' way {found[1]['seconds']:.2f} s")
    return measured, build_model(sized, queries, candidates, case.dims)


# More ranks.


def build_model(sized: dict[Any, Record], queries: int, candidates: int, dims: int) -> Record:
    """Predictions by world size, and relative errors where the model can be checked; of what could be fitted."""

    def fit(terms: list[list[float]], values: list[float]) -> Any:  # least relative squares, nothing negative
        return nnls(np.array(terms) / np.array(values)[:, None], np.ones(len(values)))[0]

    def work(q: float, m: float) -> list[float]:
        return [q * m, q + m, 1.0]

    def store(q: float, m: float) -> list[float]:
        return [q, min(m, CHUNK), 1.0]

    def traffic(q: float, m: float, world: int) -> float:  # q of all ranks, m of one
        others, blocks = q / world * (world - 1), math.ceil(m / CHUNK)
        return others * (4 * dims + 2 * coordinates + 26 + 16 * (blocks + 1) + 16)

    model: Record = {"errors": {}}
    errors: dict[str, list[float]] = model["errors"]
    worlds = sorted({key[0] for key in sized})
    coordinates = sized[worlds[-1], 1, 1]["coordinates"] if worlds else 0
    several = [w for w in worlds if w > 1]
    errors["received"] = [traffic(queries, candidates / w, w) / sized[w, 1, 1]["received"] - 1 for w in several]
    abc = uvw = None
    if 1 in worlds:
        terms = {share: work(queries * share[0], candidates * share[1]) for share in (*FITTED, *CHECKED)}
        abc = fit([terms[share] for share in FITTED], [sized[1, *share]["seconds"] for share in FITTED])
        errors["seconds"] = [float(abc @ terms[share]) / sized[1, *share]["seconds"] - 1 for share in CHECKED]
        model["abc"] = abc.tolist()
    if 2 in worlds:
        stored = {(2, *share): store(queries * share[0], candidates * share[1] / 2) for share in (*STORED, HALF)}
        stored |= {(world, 1, 1): store(queries, candidates / world) for world in worlds if world > 2}
        keys = [(2, *share) for share in STORED]
        uvw = fit([stored[key] for key in keys], [sized[key]["memory"] for key in keys])
        errors["memory"] = [float(uvw @ stored[key]) / sized[key]["memory"] - 1 for key in stored if key not in keys]
        model["uvw"] = uvw.tolist()
    for name, grown in (("strong", False), ("weak", True)):
        for world in WORLDS:
            q, m = (queries * world, candidates) if grown else (queries, candidates / world)
            model[f"{name} {world}"] = {
                "seconds": None if abc is None else float(abc @ work(q, m)),
                "memory": None if uvw is None else float(uvw @ store(q, m)),
                "received": traffic(q, m, world),
            }
    return model


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure the search that matches images to samples, beside its peers."""

    to: Path | None = None
    """Where to write, without an ending; default: print only."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """Test images among training images; training images among samples of a network, trained or not."""
    dims: tuple[int, ...] = (784, 3072, 12288)
    """Values of an image, which name the data: 784 mnist, 3072 cifar10, 12288 photos64, 64 digits."""
    methods: tuple[Method, ...] = get_args(Method)
    """Of one process; flat, projected, rounded and auto are ours."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """World sizes; none of them: no ranks."""
    queries: int = 12_000
    """Of all ranks, at most."""
    candidates: int = 60_000
    """Of all ranks, at most."""
    most: int = 250_000_000
    """Candidate values for HNSW and for ranks: a larger problem is measured once more, cut to these."""
    checked: int = 1_000
    """Queries whose answers are compared with the right ones."""
    threads: int = 0
    """Of one process; 0: this machine's cores."""
    repeats: int = 3
    """Runs of each method, of which the best counts."""
    budget: float = 100.0
    """Seconds after which a method is not run again."""
    data: Path = Path("data")
    """Folder of packed data sets."""
    runs: Path = Path("runs")
    """Folder of runs."""
    scratch: Path = Path(tempfile.gettempdir()) / "naign-match"
    """Where queries and candidates are kept, up to 12 GB."""
    quick: bool = False
    """Tiny sizes, to see that all works."""

    def __post_init__(self) -> None:
        if unknown := set(self.dims) - set(SETS):
            raise InputError(f"no data set has images of {min(unknown)} values: choose --dims of {tuple(SETS)}")
        if self.quick:
            self.queries, self.candidates, self.checked, self.repeats = 240, 480, 100, 1


def main(settings: Settings) -> None:
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(settings.threads or cores)
    faiss.omp_set_num_threads(settings.threads or cores)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    machine = {
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": cores,
        "threads": settings.threads or cores,
        "torch": torch.__version__,
        "faiss": faiss.__version__,
    }
    results: Record = {"machine": machine, "problems": {}}
    file = settings.to.with_suffix(".json") if settings.to else None
    if file and file.exists():
        old = json.loads(file.read_text())
        if old["machine"] != machine:
            raise InputError(f"{file} was measured on another machine: remove it, or write --to another place")
        results = old
    for kind, dims in itertools.product(settings.kinds, settings.dims):
        sizes, folders = (settings.queries, settings.candidates), (settings.data, settings.runs, settings.scratch)
        case = prepare(kind, dims, *sizes, *folders)
        cut = min(1.0, settings.most / dims / rows_of(case.candidates))
        for share in sorted({cut, 1.0}):
            problem = measure(settings, case, share, whole=share > cut)
            results["problems"][f"{kind} {dims} x {problem['candidates']}"] = problem
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(results, indent=1) + "\n")
                file.with_suffix(".md").write_text(page(results))
    print(page(results))


def measure(settings: Settings, case: Case, share: float, *, whole: bool) -> Record:
    """That share of the case by all methods; a problem too large for HNSW and ranks (`whole`) by the others alone."""
    even = math.lcm(*settings.ranks)  # all ranks have equally many
    queries, candidates = (
        read_rows(path, 0, int(share * rows_of(path)) // even * even) for path in (case.queries, case.candidates)
    )
    say(f"{case.kind}, {case.dims} values: {len(queries)} x {len(candidates)}")
    looked = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[: settings.checked].sort().values
    right = right_answers(queries[looked], candidates)
    methods = [method for method in settings.methods if not (whole and method == "HNSW")]
    problem = {
        "kind": case.kind,
        "dims": case.dims,
        "queries": len(queries),
        "candidates": len(candidates),
        "source": case.source,
        "checked": len(looked),
        "methods": compare(queries, candidates, methods, looked, right, settings.repeats, settings.budget),
    }
    sizes = len(queries), len(candidates)
    del queries, candidates
    worlds = () if whole else settings.ranks
    limits = settings.repeats, settings.budget
    problem["ranks"], problem["model"] = measure_ranks(case, *sizes, worlds, looked, right, *limits)
    return problem


if __name__ == "__main__":
    with exit_on_input_error("match"):
        main(tyro.cli(Settings))
