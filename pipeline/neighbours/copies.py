"""Are samples copies of training images? The nearest of ALL training images, of each sample and of each test image.

Test images are no copies, so their distances are those that a network has that did not memorise: of these 1 % are below
the default threshold, and as many of the samples should be. Mirrored training images count as well.
"""

import csv
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pipeline.distributed.ranks import together
from pipeline.errors import require
from pipeline.evaluate.recorded import fingerprint, recorded
from pipeline.evaluate.report import with_copies
from pipeline.evaluate.runs import folder_of
from pipeline.match import Blocks, search
from pipeline.match.distances import sort_lexically
from pipeline.match.exchange import ranks_of
from pipeline.model.hub import PREFIX
from pipeline.model.naign import NAIGN
from pipeline.model.scale import scaled
from pipeline.neighbours.images import Images
from pipeline.neighbours.rows import Rows, compare, open_space
from pipeline.neighbours.work import Work, data_facts, encoder_digest
from pipeline.observe.pictures import png, rows
from pipeline.storage.base import Store
from pipeline.storage.store import open_store

QUANTILE = 0.01  # of the test images' distances: the default threshold
SHOWN = 24  # pairs in the picture


class Nearest(NamedTuple):
    """Of each query the nearest training image by (distance, number), on rank 0; elsewhere empty."""

    distances: Tensor  # (q,) float64, as `Space` has them
    numbers: Tensor  # (q,) int64
    mirrored: Tensor  # (q,) bool: it is nearest to the mirrored query


def find_nearest(queries: Rows, candidates: Rows, work: Work) -> Nearest:
    """Collective: the nearest candidate of each query, which on a tie is the one of smaller number."""

    def step(_: Tensor, rows: Tensor, blocks: Callable[[], Blocks]) -> Tensor:
        answer = search(rows.flatten(0, 1), blocks(), candidates.first)
        views = [
            torch.cat([each.cpu() for each in part.split(rows.shape[1])], 1) for part in (answer.distances, answer.ids)
        ]
        squares, ids = views  # (n, views) each
        best = sort_lexically(squares, ids)[:, :1]
        return torch.cat([squares.gather(1, best).view(torch.int64), ids.gather(1, best), best], 1)

    squares, numbers, view = compare(queries, candidates, work, step).unbind(1)
    return Nearest(queries.space.distance(squares.contiguous().view(torch.float64)), numbers, view > 0)


def copies(
    run: str,  # as for evaluate
    *,
    accelerator: Accelerator,
    data: str | None = None,  # packed data set; None: the one the run was trained on
    samples: int = 10_000,  # how many f(z) to draw
    encoder: str = "pixels",  # or the encoder whose features are compared
    threshold: float | None = None,  # distance below which a sample counts as a copy; None: that of QUANTILE
    seed: int = 0,  # of latents
    to: str = "",  # folder or prefix for the results; '': the run's evaluation/
    force: bool = False,  # give up an interrupted audit of something else in the same folder
) -> dict[str, Any]:
    """Collective: write copies.json, copies.csv, and of images copies.png. Returns what copies.json holds.

    Samples are rounded to the levels of a stored image. Every rank reads and compares its part of the training images;
    the files are the same for every number of ranks. Raises InputError where there is no model, data or encoder, or one
    of them is for another shape, and where an interrupted audit had other data, another model or other options.
    """
    ranks = ranks_of(None)
    with together(accelerator):
        beside = f"{run} is on a hub, and the results are written beside the model: give a folder for them with --to"
        require((to or not run.startswith(PREFIX), beside))
        require((samples >= 1, f"--samples is {samples}: it must be at least 1"))
        require((threshold is None or threshold > 0, f"--threshold is {threshold}: it must be above 0"))
        model = NAIGN.from_pretrained(run, device=accelerator.device)
        config, manifest, _ = recorded(model, run, data)
        train, test = Images(config, config.split), Images(config, "test")
        space = open_space(encoder, tuple(manifest.shape), accelerator.device)
        store, weights = open_store(to or f"{folder_of(run)}/evaluation"), fingerprint(model)
        facts = {"command": "copies", "data": data_facts(train.sets), "encoder": encoder_digest(space.encoder)}
        facts |= {"weights": weights, "samples": samples, "seed": seed}
        work = Work(store, ranks, facts)
    with together(accelerator):
        if ranks.rank == 0:
            work.begin(force=force)

    def draw(ids: Tensor) -> Tensor:
        """f(z) as it would be stored."""
        made = model.project(model.latent(ids, seed=seed)).cpu()
        return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) if made.ndim == 4 else made

    candidates = Rows("training", len(train), train.read, space, work)
    queries = {
        "sample": Rows("samples", samples, lambda low, high: draw(torch.arange(low, high)), space, work),
        "test": Rows("test", len(test), test.read, space, work),
    }
    with together(accelerator):
        for made in (candidates, *queries.values()):
            made.make()
    nearest = {name: find_nearest(asked, candidates, work) for name, asked in queries.items()}
    found = {"dataset": manifest.name, "training_images": len(train), "test_images": len(test)}
    found |= {"samples": samples, "seed": seed, "encoder": encoder, "weights": weights}
    with together(accelerator):
        if ranks.rank == 0:
            found |= judge(nearest["sample"].distances, nearest["test"].distances, threshold)
            found["nearest"] = _write(store, nearest, train, test)
            if space.views > 1:
                store.put("copies.png", png(_draw_pairs(nearest["sample"], train, draw)))
            store.put("copies.json", (json.dumps(found, indent=1) + "\n").encode())
            if store.exists("report.html"):
                store.put("report.html", with_copies(store.read("report.html").decode(), store, weights).encode())
    with together(accelerator):
        work.end()
    return found


def _write(store: Store, nearest: dict[str, Nearest], train: Images, test: Images) -> list[dict[str, Any]]:
    """Write copies.csv, a line for each query, and return those of the SHOWN samples that are nearest."""
    places = train.places(torch.cat([each.numbers for each in nearest.values()]).unique().tolist())
    tests, text = test.places(range(len(test))), io.StringIO()
    header = ("query", "name", "distance", "split", "shard", "key", "mirrored")
    lines = [
        (name, tests[row].key if name == "test" else row, distance, *places[number][:3], int(mirrored))
        for name, each in nearest.items()
        for row, (distance, number, mirrored) in enumerate(zip(*(part.tolist() for part in each), strict=True))
    ]
    table = csv.writer(text, lineterminator="\n")
    table.writerows([header, *lines])
    store.put("copies.csv", text.getvalue().encode())
    return [dict(zip(header, lines[row], strict=True)) for row in _first(nearest["sample"])]


def _first(samples: Nearest) -> list[int]:
    """The SHOWN samples that are nearest to a training image, the nearest first."""
    return torch.sort(samples.distances, stable=True).indices[:SHOWN].tolist()


def _draw_pairs(samples: Nearest, train: Images, draw: Callable[[Tensor], Tensor]) -> Image.Image:
    """A row for each of the SHOWN: its distance, the sample, and its nearest training image, mirrored where that is."""
    pairs = list[tuple[str, Tensor]]()
    for row in _first(samples):
        number, mirrored = int(samples.numbers[row]), bool(samples.mirrored[row])
        near = train.read(number, number + 1)
        pair = torch.cat([draw(torch.tensor([row])), near.flip(-1) if mirrored else near])
        pairs.append((f"{samples.distances[row]:.3g}{' mirrored' if mirrored else ''}", scaled(pair)))
    return rows(pairs)


def judge(samples: Tensor, tests: Tensor, threshold: float | None) -> dict[str, float | None]:
    """From distances (n,) and (m,): the threshold, the share of both that is not above it, medians and their ratio."""
    limit = float(np.quantile(tests, QUANTILE, method="inverted_cdf")) if threshold is None else threshold
    median, usual = float(samples.median()), float(tests.median())
    shares = {name: float((near <= limit).double().mean()) for name, near in (("", samples), ("test_", tests))}
    return {
        "threshold": limit,
        **{f"{name}share": share for name, share in shares.items()},
        **{"median": median, "test_median": usual, "ratio": median / usual if usual else None},
    }
