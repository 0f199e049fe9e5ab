"""Are samples copies of training images? The nearest of ALL training images, also mirrored, to each sample, and to each
test image, which is no copy: as many samples as test images should be as near. The default threshold is the distance
that QUANTILE of the test images do not exceed.
"""

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
from naign.evaluate.recorded import folder_of, recorded
from naign.match.exchange import ranks_of
from naign.model.files import PREFIX, shipped_model
from naign.model.naign import NAIGN
from naign.neighbours import CopiesOptions
from naign.neighbours.images import Images, as_csv, as_json
from naign.neighbours.rows import ImageRows, Space, check_threshold, find_near, firsts
from naign.observe.pictures import eight_bits, png, rows
from naign.storage.store import open_store

QUANTILE = 0.01
SHOWN = 24  # pairs in the picture
COLUMNS = [0, 2, 1, 3]  # of what `find_near` returns: query, bits, candidate, view
HEADER: tuple[object, ...] = (
    "query",
    "number",
    "distance",
    "shard",
    "key",
    "mirrored",
)

Draw = Callable[[int, int], Tensor]
"""Samples [first, last) as they would be stored."""


def copies(run: str, options: CopiesOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Collective: write copies.csv, copies.png and copies.json. Returns what copies.json holds, on rank 0. `run` is a
    run, a checkpoint or an exported model.

    Samples are compared as they would be stored, in 256 levels. Each rank reads and searches its part of the training
    images; the files do not depend on the number of ranks. Raises InputError where there is no model, data or encoder,
    or these do not go together.
    """
    ranks = ranks_of(None)
    with together(accelerator):
        _check(run, options)
        model = NAIGN.from_pretrained(run, device=accelerator.device)
        config, manifest = recorded(model, run, options.data)
        train = Images(config, config.split)
        test = Images(config, "test")
        space = Space(options.encoder, tuple(manifest.shape), accelerator.device)
    if accelerator.is_main_process and not model.fitted:
        print(f"warning: {run} stopped before its prior was fitted: its samples say nothing", file=sys.stderr)

    def draw(first: int, last: int) -> Tensor:
        latents = model.latent(torch.arange(first, last), seed=options.seed)
        return eight_bits(model.project(latents).cpu())

    with together(accelerator):
        candidates = ImageRows("training images", len(train), train.read, space, ranks)
        drawn = ImageRows("samples", options.samples, draw, space, ranks)
        tests = ImageRows("test images", len(test), test.read, space, ranks)
    near = []
    for queries in (drawn, tests):
        near.append(find_near(queries, candidates, ranks, accelerator.device))
    result = {
        "dataset": manifest.name,
        "training_images": len(train),
        "test_images": len(test),
        "samples": options.samples,
        "seed": options.seed,
        "encoder": options.encoder,
    }
    with together(accelerator):
        if accelerator.is_main_process:
            to = options.to or f"{folder_of(run)}/evaluation"
            _write(
                near,
                result,
                options.threshold,
                train,
                draw,
                space,
                to,
            )
    return result


def _check(run: str, options: CopiesOptions) -> None:
    writable = not run.startswith(PREFIX) and not shipped_model(run)
    require(
        (options.to or writable, f"{run} is not in a folder of yours: give one for the results with --to"),
        (1 <= options.samples < 2**40, f"--samples is {options.samples}: it must be at least 1"),
        (0 <= options.seed < 2**63, f"--seed is {options.seed}: it must be 0 to {2**63 - 1}"),
    )
    check_threshold(options.threshold)


def _write(
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
    tables = [firsts(table[:, COLUMNS], 1) for table in near]
    distances = [space.distances(table[:, 1]) for table in tables]
    found = torch.cat(tables)[:, 2].unique()
    places = train.places(found.tolist())
    lines = [HEADER]
    for query, table, values in zip(("sample", "test"), tables, distances, strict=True):
        for row, distance in zip(table.tolist(), values.tolist(), strict=True):
            number, _, nearest, view = row
            place = places[nearest]
            line = (
                query,
                number,
                distance,
                place.shard,
                place.key,
                view,
            )
            lines.append(line)
    store.put("copies.csv", as_csv(lines))
    picture = _draw_pairs(tables[0], distances[0], draw, train)
    store.put("copies.png", png(picture))
    result |= judge(distances[0], distances[1], threshold)
    store.put("copies.json", as_json(result))


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


def _draw_pairs(
    table: Tensor,
    distances: Tensor,
    draw: Draw,
    train: Images,
) -> Image.Image:
    """The nearest SHOWN pairs: distance, sample, training image, mirrored where that is nearer."""
    pairs = []
    nearest_first = torch.sort(distances, stable=True).indices
    for row in nearest_first[:SHOWN].tolist():
        _, _, nearest, view = table[row].tolist()
        image = train.read(nearest, nearest + 1)
        if view:
            image = image.flip(-1)
        pair = torch.cat([draw(row, row + 1), image])
        pairs.append((f"{distances[row]:.3g}", scaled(pair)))
    return rows(pairs)
