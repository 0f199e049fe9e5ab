"""What a training of very large scale would cost: a model of each phase, and what breaks first.

    python benchmarks/scale.py --to benchmarks/results/scale

The recipe is folder256.yaml, whose match is within groups of images of one GPU. The model takes the recipe's
arithmetic from its layers, constants of GPUs from data sheets (ASSUMED) and constants of this code that were measured
in November on two cores of an AMD EPYC (MEASURED). Nothing was measured on GPUs.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from budget import count, forwards_of
from output import ROOT, check_place, command, number, table, write

from naign.config import load
from naign.errors import exit_on_input_error
from naign.model.networks import build_network
from naign.model.prior.flow import Flow

GPUS = (8, 1024, 4096)
IMAGES = (10**7, 10**9, 10**11)
SHARE = 2048
"""Images a GPU and round, as in folder256.yaml."""
SHARD = 10_000
"""Images a shard."""
LANES = 128
"""Shards that a rank reads in turn, of tars that others wrote."""
WIDTH = 256
"""Coordinates of the search's bound."""
STEPS = 32
"""Steps a round."""
DIMS = 3 * 256 * 256

ASSUMED = {
    "flops": (100e12, "FLOP/s of f in bf16: a tenth of the H100 SXM's 989 TFLOP/s (NVIDIA's data sheet)"),
    "products": (300e12, "FLOP/s of large matrix products: a third of the same"),
    "link": (50e9, "bytes/s of a GPU to other hosts: 400 Gb/s (NVIDIA's data sheet of the DGX H100)"),
    "latency": (10e-6, "s of a step of a collective; assumed"),
    "host": (8, "GPUs a host (the same)"),
    "gets": (5500, "GETs a second and prefix (Amazon's S3 user guide, optimizing performance)"),
    "answer": (0.1, "s until S3 answers (the same guide: 100 to 200 ms)"),
    "losses": (419 / (54 * 24 * 16_384), "losses an hour and GPU: 419 in 54 days of 16,384 (arXiv 2407.21783, 3.3.4)"),
    "backoff": (10, "s until Kubernetes replaces a pod the first time"),
    "interval": (600, "s between two checkpoints, the user's choice"),
}
MEASURED = {
    "size": (3.223e4, "bytes of a JPEG of 256 x 256 with its share of the tar"),
    "decode": (308.5e-6, "processor s to read and decode it (data.py)"),
    "stream": (628.5e6, "bytes/s of a large object from S3 (SeaweedFS on loopback)"),
    "index": (460.9e6, "bytes/s of `naign index --sample-check 1` (index.py)"),
    "index cpu": (2.809e-9, "processor s a byte of the same"),
    "meet": (1.907, "s until all hosts are there (lost_hosts.py)"),
    "program": (3.177, "s from the program's start to the end of its first step"),
    "step memory": (8.75e9, "bytes of a step besides weights and moments, and of the average (budget.py)"),
    "agree": (2.411e-4, "s a rank to agree on a checkpoint, over gloo"),
    "requests": (8.192, "requests of a rank and round, of packed data"),
    "tables": (1.203, "page tables of the same"),
    "pieces": (128, "requests of a rank and round, of others' tars"),
    "table": (60_050, "bytes of a page table of 10,000 images"),
    "shard bytes": (259, "bytes of a shard in index.json"),
    "shard parse": (6.562e-6, "s to parse them"),
    "shard held": (428.2, "bytes that they take in memory"),
    "shard plan": (9.973e-7, "s a shard to plan an epoch"),
}
OF_IMAGES = (
    "epoch, hours",
    "start, s",
    "index.json, MB",
    "index.json: read by all ranks, GB",
    "index.json: of a host's memory, GB",
    "indexing by one machine, days",
    "indexing, days of a core",
)


@dataclass(kw_only=True, slots=True)
class Settings:
    """Predict the cost of large runs."""

    to: Path | None = None
    """Where to write, without an ending; default: only print."""


def main(settings: Settings) -> None:
    if settings.to:
        check_place(settings.to)
    given = constants()
    costs = {}
    for gpus in GPUS:
        for images in IMAGES:
            costs[f"{gpus} {images}"] = cost(gpus, images, given)
    text = page(costs, breaks(given))
    print(text)
    if settings.to:
        write(settings.to, text, {"constants": given, "costs": costs})


def constants() -> dict[str, float]:
    """ASSUMED, MEASURED, and the recipe's arithmetic."""
    given = {}
    for name, (value, _) in (ASSUMED | MEASURED).items():
        given[name] = value
    config = load(str(ROOT / "configs/folder256.yaml"))
    with torch.device("meta"):
        network = build_network(config.model, (3, 256, 256))
        flow = Flow(config.prior, network.code).velocity
        given["flop"] = count(network, torch.empty(1, 3, 256, 256))
    sizes = [value.numel() for value in network.parameters()]
    given["parameters"] = sum(sizes)
    given["largest"] = max(sizes)
    given["flow"] = sum(value.numel() for value in flow.parameters())
    given["forwards"] = forwards_of(config.objective)
    given["ratio"] = config.match.ratio
    given["group"] = config.match.images
    given["block"] = config.match.block
    return given


def cost(
    gpus: int,
    images: int,
    given: dict[str, float],
) -> dict[str, float]:
    """Of each phase on so many GPUs that train on so many images: value by name with unit."""
    weights = 4 * given["parameters"]
    prior = 4 * given["flow"]
    hosts = gpus / given["host"]
    queries = SHARE * gpus

    share = (gpus - 1) / gpus
    sent = weights * 2 * share  # a ring's reduce-scatter and all-gather
    products = 3 * given["forwards"] * given["flop"] * SHARE / given["flops"]
    averaging = STEPS * sent / given["link"]
    waiting = STEPS * 2 * math.log2(gpus) * given["latency"]
    fit = max(products, averaging) + waiting

    samples = given["ratio"] * SHARE
    generate = samples * given["flop"] / given["flops"]
    exchange = 4 * math.log2(gpus) * given["latency"]  # a failure, and the means of metrics
    pairs = samples * given["group"]
    encoding = (SHARE + samples) * DIMS
    search = 2 * (encoding + pairs) * WIDTH / given["products"]
    held = given["block"] * 4 * DIMS + given["group"] * (1 + given["ratio"]) * 4 * WIDTH
    besides = 4 * weights + given["step memory"] + SHARE * 4 * DIMS
    whole = fit + generate + search + exchange

    read = queries * given["size"]
    tables = min(1.0, queries / LANES / SHARD)  # of a shard, a round: that of the last round is kept
    table_bytes = given["pieces"] * tables * given["table"] / SHARE

    agreeing = 6 * given["agree"] * gpus
    moments = max(2 * weights / gpus, 8 * given["largest"])
    first = 2 * weights + 6 * prior + moments  # two models, each with the prior, and the moments of both
    files = gpus + 4
    requests = 2 * files * given["answer"]
    fetch = requests + (4 * weights + 6 * prior) / given["stream"]
    restore = fetch * (1 + (hosts > 1))  # host 0 first, then all others

    of_images = cost_of_images(gpus, images, given)
    lost = given["backoff"] + of_images["start, s"] + restore + given["interval"] / 2
    between = 3600 / (given["losses"] * gpus)
    return {
        "fit, s a round": fit,
        "fit: sent a link and step, MB": sent / 1e6,
        "match: generation, s": generate,
        "match: search, s": search,
        "match: exchange, s": exchange,
        "match: memory a rank, GB": held / 1e9,
        "memory a rank besides, GB": besides / 1e9,
        "round, s": whole,
        "reading: bytes/s of the bucket, GB": read / whole / 1e9,
        "reading: requests/s, packed": gpus * (given["requests"] + 2 * given["tables"]) / whole,
        "reading: requests/s, others' tars": gpus * given["pieces"] * (1 + 2 * tables) / whole,
        "reading: page tables of others' tars, % of the bytes": 100 * table_bytes / given["size"],
        "reading: cores a GPU that decode": SHARE * given["decode"] / whole,
        "checkpoint: rank 0 writes, GB": first / 1e9,
        "checkpoint: s, in the background": 2 * first / given["stream"] + agreeing,
        "checkpoint: files": files,
        "checkpoint: fetching it, s": restore,
        "checkpoint: requests of all hosts that fetch it": 2 * files * hosts,
        "connections a rank": 2 * gpus,
        "losses: hours between two": between / 3600,
        "losses: lost by each, s": lost,
        "losses: of the time, %": 100 * lost / between,
        "epoch, hours": images / queries * whole / 3600,
        **of_images,
    }


def cost_of_images(
    gpus: int,
    images: int,
    given: dict[str, float],
) -> dict[str, float]:
    """The part of `cost` that grows with the images alone."""
    shards = images / SHARD
    listed = shards * given["shard bytes"]
    planned = shards * (given["shard parse"] + given["shard plan"])
    size = images * given["size"]
    return {
        "start, s": given["meet"] + given["program"] + listed / given["stream"] + planned,
        "index.json, MB": listed / 1e6,
        "index.json: read by all ranks, GB": gpus * listed / 1e9,
        "index.json: of a host's memory, GB": shards * given["shard held"] * given["host"] / 1e9,
        "indexing by one machine, days": size / given["index"] / 86_400,
        "indexing, days of a core": size * given["index cpu"] / 86_400,
    }


LIMITS = (
    (
        "reading: requests/s, others' tars",
        ASSUMED["gets"][0],
        "Requests for tars that others wrote: each block of 16 images is one, and needs its shard's page table.",
        "Pack the data: dealt shards are read in order. Or spread them over prefixes, with longer blocks.",
    ),
    (
        "checkpoint: fetching it, s",
        60,
        "Fetching a checkpoint takes a minute: a file a rank, in turn, on host 0 and then on the others.",
        "No file of ranks that own no moments; several files at a time; all hosts at once.",
    ),
    (
        "connections a rank",
        1024,
        "Connections: two gloo groups, all with all, against the usual limit of 1,024 open files.",
        "Raise the limit (containers have more); agree within a host first.",
    ),
    (
        "reading: requests/s, packed",
        ASSUMED["gets"][0],
        "Requests for packed data, to one prefix.",
        "More prefixes, each a data set of data.path.",
    ),
    (
        "losses: of the time, %",
        5,
        "Losses cost 5 % of the time.",
        "Checkpoints more often, as they are written beside the rounds; spare hosts.",
    ),
    (
        "indexing by one machine, days",
        1,
        "`naign index` on one machine takes a day.",
        "Index prefixes on many machines, and list them in data.path.",
    ),
    (
        "index.json: of a host's memory, GB",
        32,
        "index.json takes 32 GB of a host's memory.",
        "Shards of 100,000 images; an index that is mapped, not parsed.",
    ),
)
"""A quantity of `cost`, its limit, what breaks there, and what would be done."""


def breaks(given: dict[str, float]) -> list[list[str]]:
    """From which size on each limit is exceeded."""
    rows = []
    for name, limit, what, remedy in LIMITS:
        if name in OF_IMAGES:
            images = 10**6
            while cost(8, images, given)[name] <= limit:
                images *= 10
            rows.append([f"{images:.0e} images", what, remedy])
        else:
            gpus = 8
            while cost(gpus, 10**9, given)[name] <= limit:
                gpus += 8
            rows.append([f"{gpus:,} GPUs", what, remedy])
    return rows


def page(costs: dict[str, dict[str, float]], broken: list[list[str]]) -> str:
    """All tables."""
    names = [name for name in costs[f"{GPUS[0]} {IMAGES[0]}"] if name not in OF_IMAGES]
    by_gpus = []
    for name in names:
        values = [costs[f"{gpus} {IMAGES[1]}"][name] for gpus in GPUS]
        by_gpus.append([name, *map(number, values)])
    by_images = []
    for images in IMAGES:
        for gpus in GPUS:
            found = costs[f"{gpus} {images}"]
            cells = [number(found[name]) for name in OF_IMAGES]
            by_images.append([f"{images:.0e} images on {gpus:,} GPUs", *cells])
    parts = [
        f"What very large runs would cost, computed.\n\n{command()}",
        "On GPUs, predicted. 10^9 images:",
        table(["", *(f"{gpus:,} GPUs" for gpus in GPUS)], by_gpus),
        "What depends on the images:",
        table(["", *OF_IMAGES], by_images),
        "What breaks first:",
        table(["from", "what", "what would be done"], broken),
    ]
    for title, group in (("Assumed:", ASSUMED), ("Measured on two cores:", MEASURED)):
        rows = []
        for name, (value, source) in group.items():
            rows.append([name, f"{value:.4g}", source])
        parts += [title, table(["", "value", "source"], rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    with exit_on_input_error("scale"):
        main(tyro.cli(Settings))
