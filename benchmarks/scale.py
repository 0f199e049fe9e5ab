"""What a training of very large scale would cost: a model of each phase, and how well it predicts small ones.

    python benchmarks/scale.py --to benchmarks/results/scale

Rounds are measured on 1, 2, 4 and 8 gloo ranks of this machine, in processor time and in bytes, since its cores are
shared. The model's coefficients come from 1, 2 and 4 ranks; what 8 take is predicted, and stands beside what was
measured. The plans of large data sets are computed as a run computes them. With these constants, those of other
benchmarks' results, and GPU constants from data sheets (ASSUMED), the model gives the cost of each phase on GPUs, for
the network of folder256.yaml with a match. None of the GPU numbers was measured.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from budget import count
from scale_ranks import Record, check, fit_line, index, plan, rounds_on
from torch import nn
from trained import ROOT, check_place, command, table, write

from naign.config import load
from naign.data.order import LANES
from naign.errors import exit_on_input_error
from naign.model.networks import build_network
from naign.model.prior.flow import Flow

GPUS, IMAGES = (8, 512, 4096), (10**7, 10**9, 10**11)
SHARE, SHARD, WIDTH, STEPS = 2048, 10_000, 256, 32
"""Images a GPU and round, as of folder256.yaml; images a shard; coordinates of the search's bound; steps a round."""
DIMS = 3 * 256 * 256
OF_IMAGES = (
    *("epoch, hours", "start, s", "index.json, MB", "index.json: read by all ranks, GB"),
    *("index.json: of a host's memory, GB", "indexing by one machine, days", "indexing, days of a core"),
)
HEADROOM = 8e9  # bytes of a GPU's memory that CUDA, NCCL and fragments take
RESULTS = ROOT / "benchmarks/results"

ASSUMED: dict[str, tuple[float, str]] = {
    "flops": (100e12, "FLOP/s of f in bf16: a tenth of the H100 SXM's 989 TFLOP/s (NVIDIA's data sheet)"),
    "products": (300e12, "FLOP/s of large matrix products: a third of the same"),
    "memory": (80e9, "bytes of a GPU (the same data sheet)"),
    "link": (50e9, "bytes/s of a GPU to other hosts: 400 Gb/s (NVIDIA's data sheet of the DGX H100)"),
    "latency": (10e-6, "s of a step of a collective; assumed"),
    "host": (8, "GPUs a host (the same)"),
    "gets": (5500, "GETs a second and prefix (Amazon's S3 user guide, optimizing performance)"),
    "answer": (0.1, "s until S3 answers (the same guide: 100 to 200 ms)"),
    "losses": (419 / (54 * 24 * 16_384), "losses an hour and GPU: 419 in 54 days of 16,384 (arXiv 2407.21783, 3.3.4)"),
    "backoff": (10, "s until Kubernetes replaces a pod the first time"),
    "interval": (600, "s between two checkpoints, the user's choice"),
}


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure small ranks, and predict large ones."""

    quick: bool = False
    """Two ranks and small rounds, to see that all works."""
    to: Path | None = None
    """Where to write, without an ending; default: only print."""


def main(settings: Settings) -> None:
    if settings.to:
        check_place(settings.to)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    worlds, images, rounds, ranks = ((1, 2), 64, 1, 16) if settings.quick else ((1, 2, 4, 8), 512, 6, 4096)
    begin = sum(os.times()[:4])
    ranks_of = {world: rounds_on(world, images, 2 * images, rounds) for world in worlds}
    sets = IMAGES[:2] if settings.quick else IMAGES
    plans = [
        plan(count_of, SHARD, int(constants()["size"]), 4096, SHARE, lanes, ranks if count_of < 10**11 else 8)
        for count_of in sets
        for lanes in (1, LANES)
    ]
    listed = index(1000 if settings.quick else 100_000)
    fixed = constants() | {
        "agree": (slope := fit_line(ranks_of, "agree"))[1],
        "agree base": slope[0],
        "shard bytes": listed["bytes"] / listed["shards"],
        "shard parse": listed["seconds"] / listed["shards"],
        "shard held": listed["held"] / listed["shards"],
        "shard plan": plans[-1]["first"] / plans[-1]["shards"],
        "requests": plans[0]["requests"],
        "tables": plans[0]["tables"],
        "pieces": plans[1]["requests"],
        "table": plans[0]["table"],
    }
    checked = check(ranks_of, images, 2 * images)
    costs = {f"{gpus} {count_of}": cost(gpus, count_of, fixed) for gpus in GPUS for count_of in IMAGES}
    results = {
        "processor_seconds": sum(os.times()[:4])
        - begin
        + sum(rank["cpu"] for ranks in ranks_of.values() for rank in ranks),
        **{"ranks": ranks_of, "checked": checked, "plans": plans, "index": listed},
        **{"measured": fixed, "assumed": {name: value for name, (value, _) in ASSUMED.items()}, "costs": costs},
        "breaks": (broken := breaks(fixed)),
    }
    print(shown := page(results, broken))
    if settings.to:
        write(settings.to, shown, results)


def constants() -> dict[str, float]:
    """Of other benchmarks' results, and of the recipe by its arithmetic."""
    data, indexed, losses, memory, step = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("data", "index", "losses", "memory", "step")
    )
    read = next(row for row in data["sets"]["photos256"]["rows"] if (row["where"], row["title"]) == ("S3", "ours"))
    (wall, _), name = min(indexed["seconds"]["naign index --sample-check 1"]), "naign index --sample-check 1"
    met = [loss["met"] - loss["replaced"] for row in losses.values() for loss in row["losses"]]
    config = load(str(ROOT / "configs/folder256.yaml"))
    with torch.device("meta"):
        network, image = build_network(config.model, (3, 256, 256)), torch.empty(1, 3, 256, 256)
        flow: nn.Module = Flow(config.prior, network.code).velocity
        flops = count(network, image)
    return {
        "size": read["bytes"] / read["images"],
        "decode": read["cpu"] / read["images"],
        "stream": data["large"]["read"] / data["large"]["rows"]["ours"]["seconds"],
        "index": 1e6 * indexed["megabytes"] / wall,
        "index cpu": min(cpu for _, cpu in indexed["seconds"][name]) / (1e6 * indexed["megabytes"]),
        "meet": sorted(met)[len(met) // 2],
        "program": min(min(seconds) for seconds in step["resume"].values()),
        "step memory": 1e9 * sum(memory["folder256"]["gigabytes"][1:3]),
        "parameters": sum(value.numel() for value in network.parameters()),
        "largest": max(value.numel() for value in network.parameters()),
        "flow": sum(value.numel() for value in flow.parameters()),
        "flop": flops,
        "forwards": config.objective.forwards + 1,  # with objective.imle
    }


def cost(gpus: int, images: int, fixed: dict[str, float]) -> dict[str, float]:
    """Of each phase on so many GPUs that train on so many images: name with unit -> value."""
    given = fixed | {name: value for name, (value, _) in ASSUMED.items()}
    weights, share = 4 * given["parameters"], (gpus - 1) / gpus
    sent, flop, size = weights * 2 * share, given["flop"], given["size"]
    fit = max(3 * given["forwards"] * flop * SHARE / given["flops"], STEPS * sent / given["link"])
    fit += STEPS * 2 * math.log2(gpus) * given["latency"]
    generate = SHARE * flop / given["flops"]
    queries = SHARE * gpus
    received = queries * share * (4 * DIMS + 2 * WIDTH)
    search = 2 * (2 * SHARE * DIMS + queries * SHARE) * WIDTH / given["products"]
    hosts = gpus / given["host"]
    grouped = fit + generate + (search + received / given["link"]) / hosts
    tables = min(1.0, queries / LANES / SHARD)  # of a lane, a round: before, the one of the last round is kept
    agree = given["agree base"] + given["agree"] * gpus
    prior = 4 * given["flow"]
    moments = max(2 * weights / gpus, 8 * given["largest"])
    first = 2 * weights + 6 * prior + moments  # two models, each with the prior; four times what it trains
    fetch = 2 * (gpus + 4) * given["answer"] + (4 * weights + 6 * prior) / given["stream"]
    restore = fetch * (1 + (hosts > 1))  # host 0 first, then all others
    of_images = cost_of_images(gpus, images, given)
    lost, between = (
        given["backoff"] + of_images["start, s"] + restore + given["interval"] / 2,
        3600 / (given["losses"] * gpus),
    )
    return {
        "fit, s a round": fit,
        "fit: sent a link and step, MB": sent / 1e6,
        "match: generation, s": generate,
        "match: search, s": search,
        "match: received a rank, GB": received / 1e9,
        "match: exchange, s": received / given["link"],
        "match: memory a rank, GB": queries * (4 * DIMS + 4 * WIDTH) / 1e9,
        "memory a rank besides, GB": (16 * given["parameters"] + given["step memory"] + SHARE * 4 * DIMS) / 1e9,
        "round, s": fit + generate + search + received / given["link"],
        "round with matches within hosts, s": grouped,
        "reading: bytes/s of the bucket, GB": queries * size / grouped / 1e9,
        "reading: requests/s, packed": gpus * (given["requests"] + 2 * given["tables"]) / grouped,
        "reading: requests/s, others' tars": gpus * given["pieces"] * (1 + 2 * tables) / grouped,
        "reading: page tables of others' tars, % of the bytes": 100
        * given["pieces"]
        * tables
        * given["table"]
        / SHARE
        / size,
        "reading: cores a GPU that decode": SHARE * given["decode"] / grouped,
        "checkpoint: rank 0 writes, GB": first / 1e9,
        "checkpoint: s, in the background": 2 * first / given["stream"] + 6 * agree,
        "checkpoint: files": gpus + 4,
        "checkpoint: fetching it, s": restore,
        "checkpoint: requests of all hosts that fetch it": 2 * (gpus + 4) * hosts,
        "connections a rank": 2 * gpus,
        "losses: hours between two": between / 3600,
        "losses: lost by each, s": lost,
        "losses: of the time, %": 100 * lost / between,
        "epoch, hours": images / queries * grouped / 3600,
        **of_images,
    }


def cost_of_images(gpus: int, images: int, given: dict[str, float]) -> dict[str, float]:
    """The part of `cost` that grows with the images alone."""
    shards, size = images / SHARD, given["size"]
    listed = shards * given["shard bytes"]
    return {
        "start, s": given["meet"]
        + given["program"]
        + listed / given["stream"]
        + shards * (given["shard parse"] + given["shard plan"]),
        "index.json, MB": listed / 1e6,
        "index.json: read by all ranks, GB": gpus * listed / 1e9,
        "index.json: of a host's memory, GB": shards * given["shard held"] * given["host"] / 1e9,
        "indexing by one machine, days": images * size / given["index"] / 86_400,
        "indexing, days of a core": images * size * given["index cpu"] / 86_400,
    }


def breaks(fixed: dict[str, float]) -> list[tuple[str, str, str]]:
    """What breaks, from which size on, in the order of sizes, and what would be done."""

    room = (ASSUMED["memory"][0] - HEADROOM) / 1e9 - cost(8, 10**9, fixed)["memory a rank besides, GB"]

    def gpus(name: str, most: float) -> str:
        return (
            f"{next((count for count in range(8, 10**5, 8) if cost(count, 10**9, fixed)[name] > most), 10**5):,} GPUs"
        )

    def images(name: str, most: float) -> str:
        return f"{next(10**power for power in range(6, 15) if cost(8, 10**power, fixed)[name] > most):.0e} images"

    gets = ASSUMED["gets"][0]
    return [
        (
            gpus("match: memory a rank, GB", room),
            "The match: all images of a round lie on every GPU.",
            "Search within groups of 8 GPUs: `search(group=...)` can, the loop does not ask for it. Today: keep "
            "match.round below this many times 2,048.",
        ),
        (
            gpus("reading: requests/s, others' tars", gets),
            "Requests for tars that others wrote: each block of 16 images is one, and needs its shard's page table.",
            "Pack the data: dealt shards are read in order. Or spread them over prefixes, with longer blocks.",
        ),
        (
            gpus("checkpoint: fetching it, s", 60),
            "Fetching a checkpoint takes a minute: a file a rank, in turn, on host 0 and then on the others.",
            "No file of ranks that own no moments; several files at a time; all hosts at once.",
        ),
        (
            gpus("connections a rank", 1024),
            "Connections: two gloo groups, all with all, against the usual limit of 1,024 open files.",
            "Raise the limit (containers have more); agree within a host first.",
        ),
        (
            gpus("reading: requests/s, packed", gets),
            "Requests for packed data, to one prefix.",
            "More prefixes, each a data set of data.path; data.cache on the hosts' disks.",
        ),
        (
            gpus("losses: of the time, %", 5),
            "Losses cost 5 % of the time.",
            "Checkpoints more often, as they are written beside the rounds; spare hosts.",
        ),
        (
            images("indexing by one machine, days", 1),
            "`naign index` on one machine takes a day.",
            "Index prefixes on many machines, and list them in data.path.",
        ),
        (
            images("index.json: of a host's memory, GB", 32),
            "index.json takes 32 GB of a host's memory.",
            "Shards of 100,000 images; an index that is mapped, not parsed.",
        ),
    ]


def page(results: Record, broken: list[tuple[str, str, str]]) -> str:
    """All tables."""
    checked, costs, plans = results["checked"], results["costs"], results["plans"]
    worlds = sorted({row["ranks"] for row in checked})
    rows = [
        [what if not unit else f"{what}, {unit}"]
        + [
            f"{row['predicted']:.4g} / {row['measured']:.4g}"
            for row in sorted(checked, key=lambda row: int(row["ranks"]))
            if row["what"] == what
        ]
        for what, unit in dict.fromkeys((row["what"], row["unit"]) for row in checked)
    ]
    planned = [
        [
            f"{row['images']:.0e}",
            f"{row['shards']:,} shards, {'packed' if row['lanes'] == 1 else 'of others'}",
            f"{row['ranks']:,}",
            *(f"{1e3 * row['first']:,.1f} ms", f"{row['memory'] / 1e6:,.1f} MB", f"{1e3 * row['next']:.2f} ms"),
            *(f"{row['requests']:.1f}", f"{row['tables']:.1f}", f"{row['bytes'] / 1e6:.0f} MB"),
        ]
        for row in plans
    ]
    names = list(costs[f"{GPUS[0]} {IMAGES[0]}"])
    by_gpus = [
        [name, *(text(costs[f"{gpus} {IMAGES[1]}"][name]) for gpus in GPUS)] for name in names[: -len(OF_IMAGES)]
    ]
    by_images = [
        [f"{images:.0e} images on {gpus:,} GPUs", *(text(costs[f"{gpus} {images}"][name]) for name in OF_IMAGES)]
        for images in IMAGES
        for gpus in GPUS
    ]
    parts = [
        f"{command()}: {results['processor_seconds']:.0f} s of processor time.",
        "Predicted / measured, a rank and round: bytes and connections from shapes, processor time from 1, 2 and 4.",
        table(["ranks:", *map(str, worlds)], rows),
        "Plans of 4,096 ranks with 2,048 images each. A rank computes its part; together they have each image once.",
        table(["images", "as", "ranks computed", "first plan of an epoch", "memory", "each next", "requests a round",
               "page tables", "bytes"], planned),
        "On GPUs, predicted. 10^9 images:",
        table(["", *(f"{gpus:,} GPUs" for gpus in GPUS)], by_gpus),
        "What depends on the images:",
        table(["", *OF_IMAGES], by_images),
        "What breaks first:",
        table(["from", "what", "what would be done"], [list(row) for row in broken]),
        "Assumed:",
        table(["", "value", "source"], [[name, f"{value:.3g}", source] for name, (value, source) in ASSUMED.items()]),
        "Measured, here and by the other benchmarks:",
        table(["", "value"], [[name, f"{value:.4g}"] for name, value in results["measured"].items()]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def text(value: float) -> str:
    """With three digits, or none behind the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    with exit_on_input_error("scale"):
        sys.exit(main(tyro.cli(Settings)))
