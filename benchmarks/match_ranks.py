"""The runs of match.py on several gloo ranks of this machine: ours, and the peers' way."""

import ctypes
import gc
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.distributed as dist
from match_data import Case, Record, read_rows
from torch import Tensor

from naign.match.across_ranks import Blocks, search

CHUNK = 4096
"""Candidates that a rank makes at once."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    method: str
    """One of ours, or `peers`."""
    queries: int
    candidates: int
    """Of all ranks."""


def on_ranks(world: int, case: Case, jobs: list[Job], repeats: int, budget: float) -> list[Record]:
    """Each job's best run on that many gloo ranks of one thread: by the slowest rank, with the ids of all."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=context) as pool:
        meeting = f"file://{folder}/meeting"
        tasks = [pool.submit(on_rank, rank, world, meeting, case, jobs, repeats, budget) for rank in range(world)]
        parts = [task.result() for task in tasks]
    best = []
    for runs in zip(*parts, strict=True):  # of one job: a list of runs on each rank
        merged = []
        for ranks in zip(*runs, strict=True):  # of one run: a record on each rank
            merged.append(max(ranks, key=lambda record: float(record["seconds"])))
            merged[-1] |= {key: max(record[key] for record in ranks) for key in ("exchange", "received")}
            merged[-1]["ids"] = np.concatenate([record["ids"] for record in ranks])
        memory = max(record["memory"] for ranks in runs for record in ranks)
        best.append(min(merged, key=lambda record: float(record["seconds"])) | {"memory": memory})
    return best


def on_rank(
    rank: int, world: int, meeting: str, case: Case, jobs: list[Job], repeats: int, budget: float
) -> list[list[Record]]:
    """This rank's runs of each job, taken in turns."""
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)  # its new name is too new
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    runs: list[list[Record]] = [[] for _ in jobs]
    spent = torch.zeros(len(jobs))
    for _ in range(repeats):
        for number in [number for number in range(len(jobs)) if spent[number] <= budget]:
            start = time.perf_counter()
            runs[number].append(run_job(jobs[number], case, rank, world))
            spent[number] += time.perf_counter() - start
        dist.all_reduce(spent, dist.ReduceOp.MAX)  # ranks agree on which jobs are run again
    dist.destroy_process_group()
    return runs


def run_job(job: Job, case: Case, rank: int, world: int) -> Record:
    """Seconds, bytes and ids of this rank. Ranks have equal shares; a remainder would be left out."""
    share, first = job.candidates // world, rank * (job.candidates // world)
    low, high = (place * (job.queries // world) for place in (rank, rank + 1))
    queries = read_rows(case.queries, low, high)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier jobs freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
    before = status("VmRSS")
    dist.barrier()
    start = time.perf_counter()
    if job.method == "peers":
        pool = mine = read_rows(case.candidates, first, first + share)
        exchange = time.perf_counter()
        if world > 1:
            pool = torch.empty(world * share, case.dims)
            dist.all_gather_into_tensor(pool, mine)
        exchange = time.perf_counter() - exchange
        index = faiss.IndexFlatL2(case.dims)
        index.add(pool.numpy())
        ids = index.search(queries.numpy(), 1)[1][:, 0]
        received, coordinates = mine.nbytes * (world - 1), 0
    else:

        def make(low: int, high: int) -> Tensor:
            return read_rows(case.candidates, first + low, first + high)

        found = search(queries, Blocks(rows=share, make=make, size=CHUNK), first, method=job.method)
        ids, received, exchange = found.ids[:, 0].numpy(), found.received, found.exchange
        coordinates = int(found.method.split()[2]) if found.method[0] in "pr" else 0  # projected on 119 coordinates
    seconds, memory = time.perf_counter() - start - exchange, status("VmHWM") - before
    times = {"seconds": seconds, "exchange": exchange}
    return {**times, "received": received, "coordinates": coordinates, "memory": memory, "ids": ids}


def status(field: str) -> int:
    """VmRSS or VmHWM of this process, the resident set and its peak, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
