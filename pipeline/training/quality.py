"""Quality while a run trains: the distance of samples, recall and repairs every few rounds, and the best of them."""

import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.manifest import BEST
from pipeline.config import Config
from pipeline.data import read_split
from pipeline.data.degrade import KINDS, degrade
from pipeline.distributed import gather, together, total
from pipeline.errors import InputError
from pipeline.evaluate.coverage import NEIGHBOURS, coverage
from pipeline.evaluate.frechet import frechet_distance
from pipeline.evaluate.restoration import mae
from pipeline.model import scaled
from pipeline.model.encoders import Encoder, choose_encoder
from pipeline.training.round import RoundState, Run

log = logging.getLogger("naign.quality")

BATCH = 500  # samples at once
ROUND = 2**32 - 2  # a round that is never trained: the same latents each time


def measure_quality(run: Run, state: RoundState, values: dict[str, float]) -> bool:
    """Add quality/* to `values` if a measurement is due, and end the run where patience ends. Collective.

    Returns whether this is the best so far.
    """
    quality, rounds = run.quality, run.position.round
    if quality is None or not quality.due(rounds):
        return False
    with run.phase("quality"):
        found, better = quality.measure(run, state)
    values |= found
    if quality.exhausted(rounds) and rounds < run.rounds:
        run.monitor.say(f"stopped in round {rounds} of {run.rounds}: no better than in round {quality.round}")
        run.rounds = rounds
    return better


def check_quality(config: Config) -> None:
    """InputError where quality.split is missing, or has too few examples."""
    if config.quality.rounds:
        split = config.quality.split
        found, _ = read_split(config.data, split, limit=NEIGHBOURS + 1)
        if len(found) <= NEIGHBOURS:
            raise InputError(f"quality.split={split} has {len(found)} examples, too few to measure with")


class Quality:
    """What a run's samples are measured against, and the best checkpoint so far."""

    def __init__(self, run: Run) -> None:
        """Collective."""
        self.config, self.file = run.config.quality, Path(run.config.run.path) / BEST
        self.encoder: Encoder = choose_encoder(replace(run.stream.manifest, shape=run.stream.shape))
        if run.rank == 0 and self.encoder.name in (run.config.objective.encoder, run.config.match.space.encoder):
            log.warning("quality/fd is measured on %s, which the run is trained with too", self.encoder.name)
        self.real: Tensor | None = None  # features, on rank 0
        with together(run.accelerator):
            if run.rank == 0:
                data = run.config.data
                real, _ = read_split(data, self.config.split, limit=self.config.samples)
                self.real = self.encoder.features(scaled(real))
        self.best, self.round = math.inf, 0  # the smallest distance, and after how many rounds
        fd, round = self._before() if run.rank == 0 else (0.0, 0)
        best, number = total([fd, round], run.accelerator)
        if number:
            self.best, self.round = best, int(number)

    def _before(self) -> tuple[float, int]:
        """Distance and round of the best checkpoint so far; 0 where there is none, or its record is damaged."""
        try:
            found = json.loads(self.file.read_text())
            return float(found["fd"]), int(found["round"])
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            log.warning("%s says nothing of the best checkpoint (%s): the next measurement is", self.file, error)
        return 0.0, 0

    def due(self, rounds: int) -> bool:
        return rounds % self.config.rounds == 0

    def exhausted(self, rounds: int) -> bool:
        """Whether quality.patience measurements in a row were no better than the best, if there is one."""
        return self.round > 0 < self.config.patience * self.config.rounds <= rounds - self.round

    def measure(self, run: Run, state: RoundState) -> tuple[dict[str, float], bool]:
        """The values of `quality/*`, and whether they are the best so far. Collective."""
        begin, share = time.perf_counter(), -(-self.config.samples // run.world)
        random = state.random.as_sampled(ROUND)
        made, moved = [], 0.0
        for ids in torch.arange(run.rank * share, (run.rank + 1) * share).split(BATCH):
            run.watchdog.beat()
            once = run.engine.exported("", random.latents(ids))
            moved += mae(run.engine.exported("", once), once) * len(ids) / share / run.world
            made.append(self.encoder.features(once.cpu()))
        features = gather(torch.cat(made), run.accelerator)[: self.config.samples].cpu()
        errors = [mae_of_repair(run, state.images[:BATCH], kind) for kind in KINDS if state.images.ndim == 4]
        found = {"fd": 0.0, "recall": 0.0, "precision": 0.0}
        with together(run.accelerator):
            if self.real is not None:
                finite = bool(torch.isfinite(features).all())
                found["fd"] = frechet_distance(features, self.real) if finite else math.inf
                if finite:
                    number = min(len(features), len(self.real))
                    cover = coverage(self.real[:number], features[:number])
                    found |= {"recall": cover.recall, "precision": cover.precision}
        values = total([*found.values(), moved, *errors], run.accelerator)
        names = [*found, "idempotence", *(f"repair_{kind}" for kind in KINDS)][: len(values)]
        better = values[0] <= self.best and math.isfinite(values[0])
        if better:
            self.best, self.round = values[0], run.position.round
        measured = {f"quality/{name}": value for name, value in zip(names, values, strict=True)}
        return measured | {"quality/seconds": time.perf_counter() - begin}, better

    def record(self, checkpoint: str) -> str:
        """The text of best.json where `checkpoint` is the best."""
        content = {"checkpoint": checkpoint, "fd": self.best, "encoder": self.encoder.name, "round": self.round}
        return json.dumps(content, indent=2) + "\n"


def mae_of_repair(run: Run, images: Tensor, kind: str) -> float:
    """This rank's part of the mean error of f on damaged images of the round."""
    damaged = degrade(images.cpu(), kind).to(images.device)  # type: ignore[arg-type]
    return mae(run.engine.exported("", damaged), images) / run.world
