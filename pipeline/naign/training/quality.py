"""Quality while a run trains: the distance of samples, recall and repairs every few rounds, and the best of them."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from naign.checkpoint.manifest import BEST, read_best
from naign.config import Config, flatten
from naign.data.damage import KINDS, degrade
from naign.data.loader import Stream, read_split
from naign.distributed.engine import Engine
from naign.distributed.ranks import gather, together, total
from naign.errors import InputError
from naign.evaluate.coverage import NEIGHBOURS, coverage
from naign.evaluate.frechet import frechet_distance
from naign.evaluate.restoration import mae
from naign.model.encoders import choose_encoder, open_encoder
from naign.model.scale import scaled
from naign.settings.budget import is_comparable, is_exhausted, measured_by

log = logging.getLogger("naign.quality")

BATCH = 500  # samples at once


class Quality:
    """What a run's samples are compared with, and the best distance so far."""

    def __init__(self, config: Config, stream: Stream, accelerator: Accelerator) -> None:
        """Collective. Raises InputError where quality.split or quality.encoder does not do for this data."""
        self.config, self.accelerator, self.settings = config.quality, accelerator, flatten(config)
        name, manifest = config.quality.encoder, replace(stream.manifest, shape=stream.shape)
        self.encoder = open_encoder("quality.encoder", name, stream.shape) if name else choose_encoder(manifest)
        self.real: Tensor | None = None  # features, on rank 0
        self.best: dict[str, Any] = {}  # as in best.json
        with together(accelerator):
            if accelerator.is_main_process:
                split = self.config.split
                real, _ = read_split(config.data, split, limit=self.config.samples)
                if len(real) <= NEIGHBOURS:
                    raise InputError(f"quality.split={split} has {len(real)} examples, too few to measure with")
                self.real = self.encoder.features(scaled(real))
                if self.encoder.name == config.objective.encoder:
                    log.warning("quality/fd is measured on %s, which the run is trained with too", self.encoder.name)
                if self.encoder.name == "pixels" and not name:
                    little = (
                        "quality/fd is measured on pooled pixels, which say little, as no encoder ships for this data"
                    )
                    log.warning("%s. Set quality.encoder: efficientnet-lite0 for photographs, or pixels", little)

    def restore_best(self, run: str, rounds: int) -> None:
        """Take over the best distance of the run's rounds, unless it was measured otherwise than now. Collective."""
        best = read_best(str(Path(run).absolute())) if self.real is not None else {}
        alike = is_comparable(self.settings, rounds, best) and best.get("encoder") == self.encoder.name
        self.best = best if alike else {}
        if self.real is not None and not self.best and Path(run, BEST).exists():
            other = "says nothing of the best checkpoint, or was measured otherwise than this run measures"
            log.warning("%s/%s %s: the next measurement counts as the best", run, BEST, other)
        (self.best,) = broadcast_object_list([self.best])

    def exhausted(self, rounds: int) -> bool:
        """Whether quality.patience ends a run of so many rounds."""
        return is_exhausted(self.settings, rounds, self.best)

    def measure(
        self, engine: Engine, latents: Callable[[Tensor], Tensor], images: Tensor, *, rounds: int
    ) -> tuple[dict[str, float], bool]:
        """The finite values of `quality/*`, and whether they are the best so far. Collective.

        `latents` of ids are the same at each measurement, `images` those of the round on this rank, after `rounds`.
        """
        begin, rank, world = time.perf_counter(), self.accelerator.process_index, self.accelerator.num_processes
        share = -(-self.config.samples // world)
        parts, moved = [], 0.0
        for ids in torch.arange(rank * share, (rank + 1) * share).split(BATCH):
            once = engine.exported("", latents(ids))
            moved += mae(engine.exported("", once), once) * len(ids) / share / world
            parts.append(self.encoder.features(once.cpu()))
        features = gather(torch.cat(parts), self.accelerator)[: self.config.samples].cpu()
        values = dict.fromkeys(("fd", "recall", "precision"), 0.0) | {"idempotence": moved}
        if images.ndim == 4:
            clean = images[:BATCH]
            for kind in KINDS:
                damaged = degrade(clean.cpu(), kind).to(clean.device)
                values[f"repair_{kind}"] = mae(engine.exported("", damaged), clean) / world
        with together(self.accelerator):
            if self.real is not None:
                values |= compare(features, self.real)
        sums = dict(zip(values, total(list(values.values()), self.accelerator), strict=True))
        better = sums["fd"] <= self.best.get("fd", math.inf) and math.isfinite(sums["fd"])
        if better:
            measured = {"encoder": self.encoder.name, "measured": measured_by(self.settings)}
            self.best = {"fd": sums["fd"], "round": rounds, **measured}
        finite = {f"quality/{name}": value for name, value in sums.items() if math.isfinite(value)}
        return finite | {"quality/seconds": time.perf_counter() - begin}, better

    def record(self, checkpoint: str) -> str:
        """The text of best.json where `checkpoint` is the best."""
        return json.dumps(self.best | {"checkpoint": checkpoint}, indent=2) + "\n"


def compare(features: Tensor, real: Tensor) -> dict[str, float]:
    """Distance, recall and precision of samples by their features; NaN where these are not finite."""
    if not torch.isfinite(features).all():
        return dict.fromkeys(("fd", "recall", "precision"), math.nan)
    number = min(len(features), len(real))
    cover = coverage(real[:number], features[:number])
    return {"fd": frechet_distance(features, real), "recall": cover["recall"], "precision": cover["precision"]}
