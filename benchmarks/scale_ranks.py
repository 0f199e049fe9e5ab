"""What scale.py measures: rounds on gloo ranks of this machine, and plans of data sets too large for it."""

import math
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from data_peers import status
from step_processes import first_network, on_ranks, opened, random_images

from naign.config import Config, parse
from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest, Shard
from naign.data.format.pages import Pager, Table, parse_table
from naign.data.order import BLOCK, Order, Piece, _epoch, _lanes, pieces, rank_rows
from naign.data.reader import Reader
from naign.match.matcher import block_range
from naign.storage.local import LocalStore
from naign.training.fit import fit
from naign.training.loop import checkpoint
from naign.training.round import find_match, take

SHAPE, CALLS = (3, 32, 32), 20
Record = dict[str, Any]


def rounds_on(world: int, images: int, pool: int, rounds: int) -> list[Record]:
    """What each of so many gloo ranks, of one thread each, spends on the phases of a round of `images` in all."""
    with tempfile.TemporaryDirectory() as scratch:
        path = random_images(Path(scratch) / "images", SHAPE, images)
        options = [
            f"--data.path={path}",
            f"--run.path={scratch}/run",
            f"--match.round={images}",
            "--train.precision=fp32",
        ]
        options += [f"--match.ratio={pool / images}", "--match.block=32", "--train.batch=64", "--prior.name=gaussian"]
        options += ["--match.method=rounded", "--model.width=32", "--train.images=1000000", "--train.ema=0.9"]
        return on_ranks(world, "forkserver", measure, parse(options), rounds)


def measure(config: Config, rounds: int) -> Record:
    """Processor seconds, the least of the rounds, and bytes written to sockets and files, of this rank's phases."""
    begun, world = time.monotonic(), dist.get_world_size() if dist.is_initialized() else 1
    spent: dict[str, list[list[float]]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        if world > 1:
            dist.barrier()
        cpu, sent = time.process_time(), written()
        result = call()
        spent.setdefault(name, []).append([time.process_time() - cpu, written() - sent])
        return result

    with redirect_stdout(StringIO()), opened(config, precision="fp32") as start:
        run = start(first_network(config, SHAPE))
        ready, record, reads = time.monotonic() - begun, dict[str, Any](), list[int]()
        for number in range(1 + rounds):
            if number == 1:
                spent.clear()  # the first round is not counted
            state, rows = timed("take", lambda: take(run, None))
            ids = torch.arange(*block_range(config.match.pool, config.match.block, run.rank, world)).split(
                config.match.block
            )
            latents = state.random.latents
            timed("generate", lambda: [run.engine.sample(latents(part)) for part in ids])  # noqa: B023
            state.match = timed("match", lambda: find_match(run, state))  # noqa: B023
            timed("fit", lambda: fit(run, state))  # noqa: B023
            timed("checkpoint", lambda: (checkpoint(run), run.writer.join()))
            run.position.round, run.position.done = run.position.round + 1, 0
            timed("agree", lambda: [run.writer._group.gather(None) for _ in range(CALLS)])
            reads.append(rows.tally.bytes)
            record |= {
                "read": sum(reads[1:]) / max(1, len(reads) - 1),
                "values": state.match.values,
                "method": state.match.described,
            }
        sizes = sorted((value.numel() for value in run.engine.bare.parameters()), reverse=True)
        record |= {"parameters": sum(sizes), "sizes": sizes, "memory": status("VmHWM"), "sockets": sockets()}
        shards = run.stream.manifest.split("train").shards
        record |= {"stored": sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)}
        record |= {"start": ready, "cpu": time.process_time()}
    for name, runs in spent.items():
        seconds, sent = np.array(runs).T
        record[name] = [float(seconds.min()), float(np.median(sent))]
    record["agree"][0] /= CALLS
    return record


def written() -> int:
    """Bytes that this process has written, to sockets too: gloo sends by writev."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def sockets() -> int:
    """Open connections of this process."""
    files = list(Path("/proc/self/fd").iterdir())
    return sum(os.path.exists(file) and str(os.readlink(file)).startswith("socket:") for file in files)


class Planner(Reader):
    """A reader that plans its requests, and makes none."""

    def planned(self, table: Table, wanted: Iterable[Piece]) -> tuple[int, int, int]:
        """Requests, bytes, and page tables of these pieces, where every shard has this table."""
        self._known = lambda shard: table  # type: ignore[assignment]
        pages = list(self._joined(page for piece in wanted for page in self._cut(piece)))
        requests = {id(request): request.pages.size for _, request in pages}
        return len(requests), sum(requests.values()), len({page.piece.shard for page, _ in pages})


def plan(images: int, shard: int, size: int, world: int, share: int, lanes: int, ranks: int) -> Record:
    """The plan of round 1 for `ranks` of `world` ranks with `share` images each: what a rank takes for it, and what it
    asks the store for. Shards have `shard` images of `size` bytes. AssertionError if an image is taken twice.
    """
    order = Order(sizes=(shard,) * (images // shard), seed=0, round_size=world * share, lanes=lanes)
    record: Record = {"images": images, "shards": len(order.sizes), "lanes": lanes, "ranks": ranks}
    for cache in (_epoch, _lanes):
        cache.cache_clear()
    tracemalloc.start()
    cpu = time.process_time()
    pieces(order, 1, *rank_rows(order.round_size, 0, world))
    record |= {"first": time.process_time() - cpu, "memory": tracemalloc.get_traced_memory()[1]}
    tracemalloc.stop()
    table, entry = page_table(shard, size)
    manifest = Manifest.of("plan", "image", (3, 256, 256), (), {"train": [entry] * len(order.sizes)})
    reader = Planner(
        *[LocalStore(".")] * 2, manifest, manifest.split("train").shards, DataConfig(path="."), lanes=lanes
    )
    listed, counts, cpu = list[Piece](), list[tuple[int, int, int]](), time.process_time()
    for rank in range(0, world, world // ranks):
        mine = pieces(order, 1, *rank_rows(order.round_size, rank, world))
        counts.append(reader.planned(table, mine))
        listed += mine
    record["next"] = (time.process_time() - cpu) / ranks
    first = np.array([piece.epoch * images + piece.shard * shard + piece.first for piece in listed])
    last = first + [piece.last - piece.first for piece in listed]
    assert (last - first).sum() == ranks * share and (np.sort(first)[1:] >= np.sort(last)[:-1]).all()
    means = np.mean(counts, axis=0).tolist()
    return record | dict(zip(("requests", "bytes", "tables"), means, strict=True)) | {"table": table.nbytes}


def page_table(shard: int, size: int) -> tuple[Table, Shard]:
    """The page table of a shard of so many equal samples, by `Pager`, and the shard's entry in index.json."""
    pager = Pager(whole=False)
    for number in range(BLOCK):
        pager.start(number * size)
        pager.write(bytes(size))
    pager.end = pager.size
    entry, data = pager.shard("train-000000.tar")
    block = parse_table(data, samples=BLOCK, size=entry.bytes)
    table = np.tile(block[:-1], -(-shard // BLOCK))
    numbers = np.arange(len(table)) // (len(block) - 1)
    table["sample"] += numbers * BLOCK
    table["byte"] += numbers * entry.bytes
    table = np.concatenate([table, block[-1:]])
    table["sample"][-1], table["byte"][-1] = shard, shard * size
    return table, replace(entry, samples=shard, bytes=shard * size, sha256="0" * 64)


def index(shards: int) -> Record:
    """Bytes of an index.json of so many shards, and what parsing it takes."""
    _, entry = page_table(10_000, 32_000)
    listed = [replace(entry, name=f"train-{number:07d}.tar") for number in range(shards)]
    text = Manifest.of("plan", "image", (3, 256, 256), (), {"train": listed}).dump()
    cpu = time.process_time()
    Manifest.parse(text, where="index.json")
    cpu = time.process_time() - cpu
    tracemalloc.start()
    manifest = Manifest.parse(text, where="index.json")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"shards": len(manifest.shards), "bytes": len(text), "seconds": cpu, "held": held, "peak": peak}


def fit_line(ranks_of: dict[int, list[Record]], name: str) -> tuple[float, float]:
    """a and b: a phase takes a rank of W ranks a + b * W processor seconds, from the two largest W."""
    (first, a), (last, b) = sorted((world, mean(ranks, name)) for world, ranks in ranks_of.items())[-2:]
    return max(0.0, a - (b - a) / (last - first) * first), max(0.0, (b - a) / (last - first))


def mean(ranks: list[Record], name: str, place: int = 0) -> float:
    """Of a phase: processor seconds (place 0) or bytes (1), the mean of the ranks."""
    return sum(rank[name][place] for rank in ranks) / len(ranks)


def check(ranks_of: dict[int, list[Record]], images: int, pool: int) -> list[Record]:
    """For each quantity and number of ranks: predicted and measured. Coefficients, if any, are of 1, 2 and 4 ranks."""
    weights, dims, steps = 4 * ranks_of[1][0]["parameters"], math.prod(SHAPE), images // 64
    features: dict[str, Callable[[int], list[float]]] = {
        "fit": lambda world: [1 / world, 1.0],  # images; and what a step takes on every rank, as AdamW
        "generate": lambda world: [1 / world],
        "search": lambda world: [1 / world, float(world > 1)],  # pairs and encoding; and the exchange
    }
    results = list[Record]()

    def add(what: str, unit: str, world: int, predicted: float, measured: float) -> None:
        results.append({"what": what, "unit": unit, "ranks": world, "predicted": predicted, "measured": measured})

    for world, ranks in ranks_of.items():
        for rank in ranks:
            rank["search"] = [rank["match"][0] - rank["generate"][0], 0.0]
        share, least = (world - 1) / world, images / world
        add("fit: sent", "MB", world, steps * weights * 2 * share / 1e6, mean(ranks, "fit", 1) / 1e6)
        coded = 2 if "bfloat16" in ranks[0]["method"] else 4  # float32 where the hardware is slow in bfloat16
        rows = least * (world - 1) * dims * (4 + coded)
        add("match: received", "MB", world, rows / 1e6, ranks[-1]["values"]["match/received"] / 1e6)
        add("reading: received", "MB", world, least * ranks[0]["stored"] / 1e6, mean_of(ranks, "read") / 1e6)
        first = 2 * weights + 8 * sum(ranks[0]["sizes"][::world])  # two models, and its part of the moments
        add("checkpoint: written by rank 0", "MB", world, first / 1e6, ranks[0]["checkpoint"][1] / 1e6)
        # Of the ranks' three gloo groups each listens, and is connected with all others.
        add("connections", "", world, 3 * world * (world > 1), mean_of(ranks, "sockets"))
    for name, feature in features.items():
        known = [(feature(world), mean(ranks, name)) for world, ranks in ranks_of.items() if world <= 4]
        scale = torch.tensor([row for row, _ in known], dtype=torch.float64)
        solved = torch.linalg.lstsq(scale, torch.tensor([value for _, value in known], dtype=torch.float64)).solution
        for world, ranks in ranks_of.items():
            predicted = float(torch.tensor(feature(world), dtype=torch.float64) @ solved)
            add(f"{name}: processor", "ms", world, 1e3 * predicted, 1e3 * mean(ranks, name))
    return results


def mean_of(ranks: list[Record], name: str) -> float:
    return float(sum(rank[name] for rank in ranks) / len(ranks))
