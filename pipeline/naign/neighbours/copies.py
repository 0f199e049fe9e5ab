"""Are samples copies of training images? The nearest of ALL training images, also mirrored, to each sample, and to each
test image, which is no copy: as many samples as test images should be as near. The default threshold is the distance
that QUANTILE of the test images do not exceed.
"""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from naign.data.images import Images
from naign.data.scale import eight_bits, scaled
from naign.distributed.ranks import together
from naign.errors import require
from naign.evaluate.recorded import folder_of, recorded
from naign.match.exchange import ranks_of
from naign.model.files import PREFIX, shipped_model
from naign.model.naign import NAIGN, warn_if_unfitted
from naign.neighbours import CopiesOptions
from naign.neighbours.rows import Nearest, build_index, find_nearest, read_part
from naign.observe.pictures import png, rows
from naign.storage.store import open_store

QUANTILE = 0.01
SHOWN = 24  # pairs in the picture
HEADER = ("query", "number", "distance", "shard", "key", "mirrored")

Draw = Callable[[int, int], Tensor]
"""Samples [first, last) as they would be stored."""


def copies(run: str, options: CopiesOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Collective: write copies.csv, copies.png and copies.json. Returns what copies.json holds, on rank 0. `run` is a
    run, a checkpoint or an exported model.

    Samples are compared as they would be stored, in 256 levels. Each rank reads and searches its part of the training
    images; the files do not depend on the number of ranks. Raises InputError where there is no model or data,
    or these do not go together.
    """
    ranks = ranks_of(None)
    with together(accelerator):
        _check(run, options)
        model = NAIGN.from_pretrained(run, device=accelerator.device)
        config, manifest = recorded(model, run, options.data)
        train = Images(config, config.split)
        test = Images(config, "test")
    if accelerator.is_main_process:
        warn_if_unfitted(model, run)

    def draw(first: int, last: int) -> Tensor:
        latents = model.latent(torch.arange(first, last), seed=options.seed)
        return eight_bits(model.project(latents).cpu())

    with together(accelerator):
        candidates = read_part("training images", len(train), train.read, manifest.shape, ranks)
        drawn = read_part("samples", options.samples, draw, manifest.shape, ranks)
        tests = read_part("test images", len(test), test.read, manifest.shape, ranks)
    index = build_index(candidates, ranks)
    samples = find_nearest(drawn, index, ranks, accelerator.device)
    unseen = find_nearest(tests, index, ranks, accelerator.device)
    result = {
        "dataset": manifest.name,
        "training_images": len(train),
        "test_images": len(test),
        "samples": options.samples,
        "seed": options.seed,
    }
    with together(accelerator):
        if accelerator.is_main_process:
            result |= judge(samples.distances, unseen.distances, options.threshold)
            store = open_store(options.to or f"{folder_of(run)}/evaluation")
            store.put("copies.csv", _table({"sample": samples, "test": unseen}, train))
            store.put("copies.png", png(_draw_pairs(samples, draw, train)))
            store.put("copies.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _check(run: str, options: CopiesOptions) -> None:
    writable = not run.startswith(PREFIX) and not shipped_model(run)
    threshold = options.threshold
    require(
        (options.to or writable, f"{run} is not in a folder of yours: give one for the results with --to"),
        (1 <= options.samples < 2**40, f"--samples is {options.samples}: it must be at least 1"),
        (0 <= options.seed < 2**63, f"--seed is {options.seed}: it must be 0 to {2**63 - 1}"),
        (threshold is None or 0 <= threshold < 1e6, f"--threshold is {threshold}: it must be 0 or more, below 1e6"),
    )


def _table(near: dict[str, Nearest], train: Images) -> bytes:
    """copies.csv: a line for each query of each kind."""
    found = torch.cat([nearest.candidates for nearest in near.values()]).unique()
    places = train.places(found.tolist())
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)
    for query, nearest in near.items():
        columns = [column.tolist() for column in nearest]
        for number, (distance, candidate, mirrored) in enumerate(zip(*columns, strict=True)):
            place = places[candidate]
            table.writerow((query, number, distance, place.shard, place.key, int(mirrored)))
    return text.getvalue().encode()


def judge(
    samples: Tensor,
    tests: Tensor,
    threshold: float | None,
) -> dict[str, float]:
    """The threshold, and which shares of the distances (n,) and (m,) of samples and test images are at most that."""
    if threshold is None:
        threshold = float(np.quantile(tests, QUANTILE, method="inverted_cdf"))
    return {
        "threshold": threshold,
        "share": float((samples <= threshold).double().mean()),
        "test_share": float((tests <= threshold).double().mean()),
    }


def _draw_pairs(samples: Nearest, draw: Draw, train: Images) -> Image.Image:
    """The nearest SHOWN pairs: distance, sample, training image, mirrored where that is nearer."""
    pairs = []
    nearest_first = torch.sort(samples.distances, stable=True).indices
    for number in nearest_first[:SHOWN].tolist():
        candidate = int(samples.candidates[number])
        image = train.read(candidate, candidate + 1)
        if samples.mirrored[number]:
            image = image.flip(-1)
        pair = torch.cat([draw(number, number + 1), image])
        pairs.append((f"{samples.distances[number]:.3g}", scaled(pair)))
    return rows(pairs)
