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
from torch import Tensor

from pipeline.checkpoint.manifest import BEST, read_best
from pipeline.config import Config, flatten
from pipeline.data.degrade import KINDS, degrade
from pipeline.data.loader import Stream, read_split
from pipeline.distributed.engine import Engine
from pipeline.distributed.ranks import broadcast_object, gather, together, total
from pipeline.errors import InputError
from pipeline.evaluate.coverage import NEIGHBOURS, coverage
from pipeline.evaluate.frechet import frechet_distance
from pipeline.evaluate.restoration import mae
from pipeline.model.encoders import Encoder, choose_encoder, load_encoder
from pipeline.model.scale import scaled

log = logging.getLogger("naign.quality")

BATCH = 500  # samples at once
MEASURED = ("quality.samples", "quality.split", "quality.encoder", "data.path", "data.index")
"""Settings that decide what quality/fd is measured on."""


class Quality:
    """What a run's samples are compared with, and the best distance so far."""

    def __init__(self, config: Config, stream: Stream, accelerator: Accelerator) -> None:
        """Collective. Raises InputError where quality.split or quality.encoder does not do for this data."""
        self.config, self.accelerator, settings = config.quality, accelerator, flatten(config)
        name, manifest = config.quality.encoder, replace(stream.manifest, shape=stream.shape)
        self.encoder = open_encoder("quality.encoder", name, stream.shape) if name else choose_encoder(manifest)
        # What a distance is measured on: distances compare only where it is the same.
        self.measured = {"encoder": self.encoder.name, "measured": {key: settings[key] for key in MEASURED}}
        self.real: Tensor | None = None  # features, on rank 0
        self.best: dict[str, Any] = {}  # as in best.json
        with together(accelerator):
            if accelerator.is_main_process:
                split = self.config.split
                real, _ = read_split(config.data, split, limit=self.config.samples)
                if len(real) <= NEIGHBOURS:
                    raise InputError(f"quality.split={split} has {len(real)} examples, too few to measure with")
                self.real = self.encoder.features(scaled(real))
                self.best = self._read_best(config.run.path)
                self._warn(config)
        self.best = broadcast_object(self.best)

    def _read_best(self, run: str) -> dict[str, Any]:
        """What best.json says of the best checkpoint so far; {} where nothing, or nothing to compare with."""
        best = read_best(run)
        if isinstance(best.get("fd"), float) and best.items() >= self.measured.items():
            return best
        if (Path(run) / BEST).exists():
            log.warning(
                "%s/%s says nothing of the best checkpoint, or was measured otherwise than this run measures: the next "
                "measurement counts as the best",
                *(run, BEST),
            )
        return {}

    def _warn(self, config: Config) -> None:
        if self.encoder.name in (config.objective.encoder, config.match.space.encoder):
            log.warning("quality/fd is measured on %s, which the run is trained with too", self.encoder.name)
        if self.encoder.name == "pixels" and not self.config.encoder:
            log.warning(
                "quality/fd is measured on pooled pixels, since no encoder is shipped for this data: it says little "
                "of what is seen. Set quality.encoder: efficientnet-lite0 for photographs, or pixels"
            )

    def measure(
        self,
        engine: Engine,
        latents: Callable[[Tensor], Tensor],  # of ids, the same at each measurement
        images: Tensor,  # of the round, on this rank
        *,
        rounds: int,  # trained so far
        beat: Callable[[], None],
    ) -> tuple[dict[str, float], bool]:
        """The finite values of `quality/*`, and whether they are the best so far. Collective."""
        begin, rank, world = time.perf_counter(), self.accelerator.process_index, self.accelerator.num_processes
        share = -(-self.config.samples // world)
        parts, moved = [], 0.0
        for ids in torch.arange(rank * share, (rank + 1) * share).split(BATCH):
            beat()
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
            self.best = {"fd": sums["fd"], "round": rounds} | self.measured
        finite = {f"quality/{name}": value for name, value in sums.items() if math.isfinite(value)}
        return finite | {"quality/seconds": time.perf_counter() - begin}, better

    def record(self, checkpoint: str) -> str:
        """The text of best.json where `checkpoint` is the best."""
        return json.dumps(self.best | {"checkpoint": checkpoint}, indent=2) + "\n"


def open_encoder(setting: str, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Encoder:
    """The encoder that `setting` names; InputError where it does not fit samples of that shape."""
    encoder = load_encoder(name)
    if encoder.network:
        encoder.network.to(device)
    if unfit := encoder.unfit(shape):
        raise InputError(f"{setting} '{name}' {unfit}")
    return encoder


def compare(features: Tensor, real: Tensor) -> dict[str, float]:
    """Distance, recall and precision of samples by their features; NaN where these are not finite."""
    if not torch.isfinite(features).all():
        return dict.fromkeys(("fd", "recall", "precision"), math.nan)
    number = min(len(features), len(real))
    cover = coverage(real[:number], features[:number])
    return {"fd": frechet_distance(features, real), "recall": cover.recall, "precision": cover.precision}
