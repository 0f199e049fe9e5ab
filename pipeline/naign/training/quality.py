"""Quality while a run trains: the distance of samples, recall and repairs every few rounds."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from naign.config import Config
from naign.data.damage import KINDS, degrade
from naign.data.loader import Stream, read_split
from naign.data.scale import scaled
from naign.distributed.engine import Engine
from naign.distributed.ranks import gather, together, total
from naign.errors import InputError
from naign.evaluate.coverage import NEIGHBOURS, coverage
from naign.evaluate.frechet import frechet_distance
from naign.evaluate.restoration import mae
from naign.model.encoders import choose_encoder, open_encoder

log = logging.getLogger("naign.quality")

SAMPLES = 2000  # compared with as many training images
BATCH = 500  # samples at once
SPLIT = "train"  # of the real examples: never choose by the split that is reported on


class Quality:
    """What a run's samples are compared with."""

    def __init__(self, config: Config, stream: Stream, accelerator: Accelerator) -> None:
        """Collective. Raises InputError where quality.encoder does not fit this data."""
        self.accelerator = accelerator
        self.real: Tensor | None = None  # features, on rank 0
        name = config.quality.encoder
        with together(accelerator):
            if name:
                self.encoder = open_encoder("quality.encoder", name, stream.shape)
            else:
                self.encoder = choose_encoder(replace(stream.manifest, shape=stream.shape))
        with together(accelerator):
            if accelerator.is_main_process:
                real, _ = read_split(config.data, SPLIT, limit=SAMPLES)
                if len(real) <= NEIGHBOURS:
                    raise InputError(f"split {SPLIT} has {len(real)} examples, too few to measure with")
                self.real = self.encoder.features(scaled(real))
                if self.encoder.name == "pixels" and not name:
                    little = "quality/fd is measured on pooled pixels, which say little: no encoder ships for this data"
                    log.warning("%s. Set quality.encoder: efficientnet-lite0 for photographs, or pixels", little)

    def measure(
        self,
        engine: Engine,
        latents: Callable[[Tensor], Tensor],  # of ids, the same at each measurement
        images: Tensor | None,  # (n, *shape) of this rank, whose repairs are measured
    ) -> dict[str, float]:
        """The finite values of `quality/*`. Collective."""
        begin = time.perf_counter()
        rank = self.accelerator.process_index
        world = self.accelerator.num_processes
        share = -(-SAMPLES // world)
        parts = []
        moved = 0.0
        for ids in torch.arange(rank * share, (rank + 1) * share).split(BATCH):
            once = engine.exported("", latents(ids))
            moved += mae(engine.exported("", once), once) * len(ids) / share / world
            parts.append(self.encoder.features(once.cpu()))
        features = gather(torch.cat(parts), self.accelerator)[:SAMPLES].cpu()
        values = {"fd": 0.0, "recall": 0.0, "precision": 0.0, "idempotence": moved}
        if images is not None and images.ndim == 4:
            clean = images[:BATCH]
            for kind in KINDS:
                damaged = degrade(clean.cpu(), kind).to(clean.device)
                values[f"repair_{kind}"] = mae(engine.exported("", damaged), clean) / world
        with together(self.accelerator):
            if self.real is not None:
                values |= distances_of(features, self.real)
        sums = dict(zip(values, total(list(values.values()), self.accelerator), strict=True))
        finite = {f"quality/{name}": value for name, value in sums.items() if math.isfinite(value)}
        return finite | {"quality/seconds": time.perf_counter() - begin}


def distances_of(features: Tensor, real: Tensor) -> dict[str, float]:
    """Distance, recall and precision of samples by their features; NaN where these are not finite."""
    if not torch.isfinite(features).all():
        return dict.fromkeys(("fd", "recall", "precision"), math.nan)
    number = min(len(features), len(real))
    cover = coverage(real[:number], features[:number])
    return {"fd": frechet_distance(features, real), "recall": cover["recall"], "precision": cover["precision"]}
