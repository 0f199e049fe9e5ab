"""What is told of a round that is done: metrics, pictures and warnings."""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pipeline.data.degrade import KINDS, degrade
from pipeline.data.loader import Stream, Taken
from pipeline.distributed.ranks import total
from pipeline.observe.pictures import grid, rows, scatter
from pipeline.observe.speed import fit_flops, peak_flops, peak_memory
from pipeline.training.round import Run, Work

log = logging.getLogger("naign.report")


def report(
    run: Run,
    work: Work,
    taken: Taken,
    values: dict[str, float],
    clock: list[float],  # when taking began, and when it, the match and the fit ended
    rounds: int,
    images: int,  # trained on since then: fewer than the round's where a run resumed in its middle
) -> None:
    """Collective: metrics, pictures and warnings of a round that is done."""
    config, position, monitor = run.config, run.position, run.monitor
    last = position.round == rounds
    if work.match:
        values |= work.match.values
        alarm(run, work.match.values)
    reported = last or position.round % config.report.rounds == 0
    if reported:
        values |= speed_values(run, clock, images)
        values |= {"seconds/training": position.seconds, "train/skipped": position.skipped}
        values |= data_values(taken, run.stream, work.number, run.accelerator)
        values |= {"checkpoint/seconds": run.writer.seconds, "checkpoint/upload_seconds": run.writer.uploaded}
    pictures, drawn = config.report.pictures, {}
    wanted = pictures and (last or position.round == 1 or position.round % pictures == 0)
    if wanted and (run.rank == 0 or run.engine.sharded):
        shown = replace(work.draw, round=rounds).latents(torch.arange(64))  # of no round: the same all along
        drawn = draw_progress(run.engine.sample, shown, work.images)
    # From here on rank 0 alone works, and may fail.
    if reported:
        monitor.scalars(values, position.images_seen, round=work.number, step=position.step)
        if work.match:
            monitor.histogram("match/distance", work.match.distances, position.images_seen)
    for name, picture in drawn.items():
        monitor.picture(name, picture, position.images_seen)


def alarm(run: Run, values: dict[str, float]) -> None:
    """Warn of a collapse: few samples that all images pull at, or one that many do."""
    size = run.config.match.round
    apart = min(1.0, run.stream.order.total / size)  # share of a round's images that can differ
    if run.rank == 0 and size * apart >= 64:
        if values.get("match/used", 1.0) < LEAST_USED * apart:
            log.warning("collapse? %.1f distinct samples for 100 images", 100 * values["match/used"])
        if values.get("match/top_share", 0.0) > MOST_SHARED:
            log.warning("collapse? one sample is the nearest to %.0f %% of the images", 100 * values["match/top_share"])


LEAST_USED, MOST_SHARED = 0.02, 0.25
"""Of a match: distinct samples an image, and the share of images that have one sample, from which on to warn."""


def speed_values(run: Run, clock: list[float], images: int) -> dict[str, float]:
    """Of a round: images/s, the share of its time in each part, from the times at which they ended, and what was done.

    `speed/mfu` is the share of the GPUs' peak that fitting used (arXiv 2204.02311, B), where the peak is known.
    """
    accelerator, spent = run.accelerator, clock[-1] - clock[0]
    flops = fit_flops(run.forward, run.config.objective.forwards) * images / (clock[3] - clock[2])
    values = {
        "speed/images_per_second": images / spent,
        "speed/images_per_second_and_rank": images / spent / run.world,
        "speed/fit_tflops": flops / 1e12,
        "memory/peak_gb": peak_memory(accelerator.device),
    }
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    if peak := peak_flops(accelerator.device, dtype):
        values["speed/mfu"] = flops / (run.world * peak)
    parts = zip(("take", "match", "fit"), clock, clock[1:], strict=False)
    return values | {f"share/{name}": (end - start) / spent for name, start, end in parts}


def data_values(taken: Taken, stream: Stream, round: int, accelerator: Accelerator) -> dict[str, float]:
    """Collective: epochs so far, and what reading the round has cost all ranks."""
    tally = taken.tally
    counts = [tally.bytes / 1e6, tally.cached / 1e6, tally.retries, tally.reread / 1e6, len(taken.broken)]
    names = ("megabytes", "cached_megabytes", "retries", "reread_megabytes", "skipped")
    sums = total([float(count) for count in counts], accelerator)
    return {"data/epoch": stream.order.epochs(round + 1)} | {
        f"data/{name}": value for name, value in zip(names, sums, strict=True)
    }


def draw_progress(
    network: Callable[[Tensor], Tensor],  # f without gradient
    latents: Tensor,  # (n, *shape): held fixed over the run, so that pictures can be compared
    examples: Tensor,  # (m, *shape) in the model's scale
) -> dict[str, Image.Image]:
    """Pictures by name: samples f(z), resamples f(f(z)), restorations; for points one scatter plot."""
    once = network(latents)
    twice = network(once)
    once, twice, examples = once.cpu(), twice.cpu(), examples.cpu()
    if once.ndim != 4:
        return {"samples": scatter([("f(z)", once), ("f(f(z))", twice)], behind=examples[:2000])}
    clean, lines = examples[:12], []
    for kind in KINDS:
        damaged = degrade(clean, kind)
        repaired = network(damaged.to(latents.device)).cpu()
        lines += [(kind.replace("_", " "), damaged), ("repaired", repaired)]
    return {
        "samples": grid(once, columns=8),
        "samples-twice": grid(twice, columns=8),
        "restorations": rows([("clean", clean), *lines]),
    }
