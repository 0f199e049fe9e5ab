"""Are samples copies of training images? The nearest of ALL training images, also mirrored, to each sample, and to each
test image, which is no copy: as many samples as test images should be as near. The default threshold is the distance
that QUANTILE of the test images do not exceed.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from naign.data.scale import scaled
from naign.distributed.ranks import together
from naign.errors import require
from naign.evaluate.recorded import fingerprint, recorded
from naign.evaluate.report import with_copies
from naign.evaluate.runs import folder_of
from naign.match.exchange import ranks_of
from naign.model.files import PREFIX, shipped_model
from naign.model.naign import NAIGN
from naign.neighbours import CopiesOptions
from naign.neighbours.images import Images, as_csv
from naign.neighbours.rows import ImageRows, Space, find_near, firsts
from naign.observe.pictures import png, rows
from naign.storage.store import open_store

QUANTILE = 0.01
SHOWN = 24  # pairs in the picture

Draw = Callable[[int, int], Tensor]
"""Samples [first, last) as they would be stored."""


def copies(run: str, options: CopiesOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Collective: write copies.csv, of images copies.png, and copies.json, and add them to the model's report.html.
    Returns what copies.json holds, on rank 0. `run` is a run, a checkpoint or an exported model.

    Samples are compared as they would be stored, in 256 levels. Each rank reads and searches its part of the training
    images; the files do not depend on the number of ranks. Raises InputError where there is no model, data or encoder,
    or these do not go together.
    """
    ranks = ranks_of(None)
    samples = options.samples
    seed = options.seed
    threshold = options.threshold
    with together(accelerator):
        require(
            (
                options.to or not run.startswith(PREFIX),
                f"{run} is on a hub: give a folder for the results with --to",
            ),
            (
                options.to or not shipped_model(run),
                f"{run} comes with naign: give a folder for the results with --to",
            ),
            (
                1 <= samples < 2**40,
                f"--samples is {samples}: it must be at least 1",
            ),
            (0 <= seed < 2**63, f"--seed is {seed}: it must be 0 to {2**63 - 1}"),
            (
                threshold is None or 0 <= threshold < 1e6,
                f"--threshold is {threshold}: it must be 0 or more, below 1e6",
            ),
        )
        model = NAIGN.from_pretrained(run, device=accelerator.device)
        config, manifest, _ = recorded(model, run, options.data)
        train = Images(config, config.split)
        test = Images(config, "test")
        if accelerator.is_main_process and not model.fitted:
            print(
                f"warning: {run} stopped before its prior was fitted: its samples say nothing",
                file=sys.stderr,
            )
        space = Space(options.encoder, tuple(manifest.shape), accelerator.device)
    result = {
        "dataset": manifest.name,
        "training_images": len(train),
        "test_images": len(test),
        "weights": fingerprint(model),
        "samples": samples,
        "seed": seed,
        "encoder": options.encoder,
    }

    def draw(first: int, last: int) -> Tensor:
        made = model.project(model.latent(torch.arange(first, last), seed=seed)).cpu()
        if made.ndim < 4:
            return made
        return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    with together(accelerator):
        candidates = ImageRows("training images", len(train), train.read, space, ranks)
        drawn = ImageRows("samples", samples, draw, space, ranks)
        tests = ImageRows("test images", len(test), test.read, space, ranks)
    near = [find_near(queries, candidates, ranks, accelerator.device) for queries in (drawn, tests)]
    with together(accelerator):
        if accelerator.is_main_process:
            to = options.to or f"{folder_of(run)}/evaluation"
            write(near, result, threshold, train, draw, space, to)
    return result


def write(
    near: list[Tensor],  # what `find_near` returned, of samples and of test images
    result: dict[str, Any],  # for copies.json; what `judge` returns is added
    threshold: float | None,
    train: Images,
    draw: Draw,
    space: Space,
    to: str,
) -> None:
    """Write all results."""
    store = open_store(to)
    tables = [firsts(table[:, [0, 2, 1, 3]], 1) for table in near]  # query, bits, candidate, view
    distances = [space.distances(table[:, 1]) for table in tables]
    places = train.places(torch.cat(tables)[:, 2].unique().tolist())
    lines = []
    for query, table, values in zip(("sample", "test"), tables, distances, strict=True):
        for (number, _, nearest, view), distance in zip(table.tolist(), values.tolist(), strict=True):
            place = places[nearest]
            lines.append((query, number, distance, place.shard, place.key, view))
    store.put(
        "copies.csv",
        as_csv(("query", "number", "distance", "shard", "key", "mirrored"), lines),
    )
    if space.views > 1:
        store.put("copies.png", png(draw_pairs(tables[0], distances[0], draw, train)))
    result |= judge(distances[0], distances[1], threshold)
    store.put("copies.json", (json.dumps(result, indent=1) + "\n").encode())
    if store.exists("report.html"):
        page = with_copies(store.read("report.html").decode(), store, result["weights"])
        store.put("report.html", page.encode())


def judge(samples: Tensor, tests: Tensor, threshold: float | None) -> dict[str, float]:
    """The threshold, and which shares of the distances (n,) and (m,) of samples and test images are at most that."""
    limit = threshold
    if limit is None:
        limit = float(np.quantile(tests, QUANTILE, method="inverted_cdf"))
    return {
        "threshold": limit,
        "share": float((samples <= limit).double().mean()),
        "test_share": float((tests <= limit).double().mean()),
    }


def draw_pairs(table: Tensor, distances: Tensor, draw: Draw, train: Images) -> Image.Image:
    """The nearest SHOWN pairs: distance, sample, training image, mirrored where that is nearer."""
    pairs = []
    for row in torch.sort(distances, stable=True).indices[:SHOWN].tolist():
        _, _, nearest, view = table[row].tolist()
        image = train.read(nearest, nearest + 1)
        if view:
            image = image.flip(-1)
        pairs.append(
            (
                f"{distances[row]:.3g}",
                scaled(torch.cat([draw(row, row + 1), image])),
            )
        )
    return rows(pairs)
