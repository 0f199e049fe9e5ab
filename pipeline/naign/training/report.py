"""What a run reports: its headline, the metrics and pictures of each round, and those of the prior's fit."""

import logging
import math
from pathlib import Path

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from naign import philox
from naign.data.damage import KINDS, degrade
from naign.data.loader import Rows
from naign.distributed.host import count_ranks
from naign.distributed.ranks import total
from naign.errors import Diverged
from naign.match import Match
from naign.observe import grid, peak_memory, rows
from naign.training.setup import count_codes
from naign.training.trainer import Trainer

log = logging.getLogger("naign.report")


def headline(run: Trainer) -> str:
    """What a run says of itself before the first round."""
    config = run.config
    stream = run.stream
    if run.finished:
        return f"nothing left to do: {config.run.path} has seen its {run.state.images_seen} images"
    weights = sum(math.prod(shape) for shape in run.engine.shapes.values()) / 1e6
    drawn = sum(value.numel() for value in run.prior.state_dict().values()) / 1e6
    start = "starting anew"
    if run.writer.newest:
        start = f"resuming from {Path(config.run.path) / 'checkpoints' / run.writer.newest}"
    second = ""
    if run.prior.learns:
        second = f", then {config.prior.name} fitted to the codes of {count_codes(config, stream)} images"
    pool = f", pool {config.match.pool}" if config.objective.needs_match else ""
    ranks = f"{run.world} x {run.accelerator.device.type} ({run.engine.described}; {count_ranks()} a host, "
    size = "x".join(map(str, stream.shape))
    return (
        f"{stream.manifest.name} {size}, {stream.order.describe()}\n"
        f"{config.objective.name} with {weights:.2f} M parameters in f, {drawn:.2f} M in the prior, on {ranks}"
        f"{torch.get_num_threads()} threads each)\n"
        f"batch {config.train.batch} = {run.engine.micro} images x {config.train.accumulate} micro-batches x "
        f"{run.world} ranks; {run.rounds} rounds of {config.match.round} images x {config.train.passes} passes for "
        f"{config.train.images}{pool}{second}; {start} in {config.run.path}"
    )


def draw_latents(run: Trainer, ids: Tensor) -> Tensor:
    """Latents (n, *shape) of samples that training never draws: from the prior once it is fitted, before from noise."""
    run.watchdog.beat()
    device = run.accelerator.device
    seed = run.config.seed
    if run.config.prior.name == "none" or (run.prior.learns and not run.state.fitted):
        return run.latents.draw(seed, philox.SAMPLES, ids, device)
    drawn = run.prior.draw(seed, philox.SAMPLES, ids, device)
    if run.prior.decodes:
        return run.engine.exported("decode", drawn)
    return drawn


def report_round(run: Trainer, read: Rows, images: Tensor, match: Match | None, values: dict[str, float]) -> None:
    """Report a round of stage 1: metrics, with the losses in `values`, and pictures. Collective."""
    config = run.config
    state = run.state
    if match:
        values |= match.values
        values["seconds/match"] = run.phases.seconds["match"]
    values |= _speed(run)
    if run.world > 1:
        alone = gather_object([run.phases.apart])
        if run.rank == 0:  # which logs and reports
            values["speed/waited"] = run.stragglers.compare(alone, sum(run.phases.seconds.values()))
    costs = {  # of what all ranks have read for the round
        "data/megabytes": read.tally.bytes / 1e6,
        "data/reread_megabytes": read.tally.reread / 1e6,
        "data/retries": read.tally.retries,
        "data/skipped": len(read.broken),
    }
    values |= zip(costs, total(list(costs.values()), run.accelerator), strict=True)
    values |= {
        "data/epoch": run.stream.order.epochs(state.round),
        "seconds/training": state.seconds,
        "train/skipped": state.skipped,
        "train/stage": 1,
        "checkpoint/seconds": run.writer.seconds,
        "checkpoint/upload_seconds": run.writer.uploaded,
    }
    pictures = {}
    every = config.report.pictures
    if every and (state.round in (1, run.rounds) or state.round % every == 0):
        pictures = _draw(run, images)
    _send(run, values, pictures)


def report_prior(run: Trainer) -> None:
    """Report the fit of the prior: its metrics and, at the end, samples. Collective."""
    run.phases.count()
    values = run.prior.read_metrics()
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is not finite: the prior cannot be fitted; lower prior.lr")
    values |= {"train/stage": 2, "prior/fitted": run.state.fitted, "seconds/training": run.state.seconds}
    pictures = {}
    if run.state.fitted >= 1 and run.config.report.pictures:
        pictures = _draw(run, None)
    _send(run, values, pictures)


def _send(run: Trainer, values: dict[str, float], pictures: dict[str, Image.Image]) -> None:
    """Give metrics and pictures to the trackers. From here on rank 0 alone works, and may fail."""
    state = run.state
    run.monitor.scalars(
        values,
        state.seen,
        images_seen=state.images_seen,
        codes_seen=state.codes_seen,
        round=max(0, state.round - 1),
        step=state.step,
    )
    for name, picture in pictures.items():
        run.monitor.picture(name, picture, state.seen)


def _speed(run: Trainer) -> dict[str, float]:
    """Images/s of a round, the share of each phase, and memory."""
    phases = run.phases.seconds
    images = run.config.match.round * run.config.train.passes
    seconds = {phase: phases[phase] for phase in ("take", "match", "fit") if phase in phases}
    spent = sum(seconds.values())
    values = {
        "speed/images_per_second": images / spent,
        "memory/peak_gb": peak_memory(run.accelerator.device),
    }
    for phase, value in seconds.items():
        values[f"share/{phase}"] = value / spent
    return values


def _draw(run: Trainer, images: Tensor | None) -> dict[str, Image.Image]:
    """Pictures by name: samples f(z), resamples f(f(z)) and restorations of `images` (n, *shape); none for points. The
    latents are the same over the run, so that pictures compare. By rank 0, or collective with a sharded network.
    """
    if run.rank != 0 and not run.engine.sharded:
        return {}
    once = run.engine.exported("", draw_latents(run, torch.arange(64)))
    if once.ndim != 4:
        return {}
    twice = run.engine.exported("", once).cpu()
    once = once.cpu()
    pictures = {"samples": grid(once, columns=8), "samples-twice": grid(twice, columns=8)}
    if images is not None:
        pictures["restorations"] = _draw_repairs(run, images[:12])
    return pictures


def _draw_repairs(run: Trainer, images: Tensor) -> Image.Image:
    """Images, each of them damaged in each way, and the repairs."""
    clean = images.cpu()
    lines = [("clean", clean)]
    for kind in KINDS:
        damaged = degrade(clean, kind)
        repaired = run.engine.exported("", damaged.to(images.device)).cpu()
        lines.append((kind.replace("_", " "), damaged))
        lines.append(("repaired", repaired))
    if run.state.round > 1 and repaired.std(0).mean() < 0.01:  # over the batch, of values in [-1, 1]
        log.warning("f makes one image of all: lower train.lr, or train with objective.distance=l2")
    return rows(lines)
