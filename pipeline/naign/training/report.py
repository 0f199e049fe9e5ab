"""What a run reports: its headline, and each round's metrics and pictures."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from naign import philox
from naign.data.degrade import KINDS, degrade
from naign.data.loader import Rows
from naign.distributed.engine import Engine
from naign.distributed.host import count_ranks
from naign.distributed.ranks import total
from naign.observe import fit_flops, grid, peak_memory, rows, scatter
from naign.training.round import RoundRandom, RoundState
from naign.training.run import Run

CLASSES = 20  # whose samples are drawn, at most


def headline(run: Run) -> str:
    """What a run says of itself before the first round."""
    config, stream, engine, train = run.config, run.stream, run.engine, run.config.train
    if run.finished:
        return f"nothing left to do: {config.run.path} has seen its {run.position.images_seen} images"
    weights = sum(math.prod(shape) for shape in engine.shapes.values()) / 1e6
    drawn = sum(value.numel() for value in run.prior.state_dict().values()) / 1e6
    newest = Path(config.run.path) / "checkpoints" / run.writer.newest
    start = f"resuming from {newest}" if run.writer.newest else "starting anew"
    alone = f" (f in the first {run.network_rounds}, then the prior alone)" if run.network_rounds < run.rounds else ""
    local = count_ranks()
    return (
        f"{stream.manifest.name} {'x'.join(map(str, stream.shape))}, {stream.order.describe()}\n"
        f"{config.objective.name} with {weights:.2f} M parameters in f, {drawn:.2f} M in the prior, on {run.world} x "
        f"{run.accelerator.device.type} ({engine.described}; {local} a host, {torch.get_num_threads()} threads each)\n"
        f"batch {train.batch} = {engine.micro} images x {train.accumulate} micro-batches x {run.world} ranks; "
        f"{run.rounds} rounds of {config.match.round} images x {train.passes} passes for {train.images}{alone}, "
        f"pool {config.match.pool}; {start} in {config.run.path}"
    )


def report(run: Run, state: RoundState, rows_read: Rows, values: dict[str, float], *, images: int) -> None:
    """Report a round: metrics, with the fit's `values`, and pictures. This start trained on `images`. Collective."""
    config, position, monitor = run.config, run.position, run.monitor
    if state.match:
        values |= state.match.values
    values |= speed_values(run, images) | {"data/epoch": run.stream.order.epochs(position.round)}
    tally, names = rows_read.tally, ("megabytes", "cached_megabytes", "reread_megabytes", "retries", "skipped")
    costs = [tally.bytes / 1e6, tally.cached / 1e6, tally.reread / 1e6, tally.retries, len(rows_read.broken)]
    values |= {f"data/{name}": value for name, value in zip(names, total(costs, run.accelerator), strict=True)}
    values |= {"seconds/training": position.seconds, "train/skipped": position.skipped}
    if run.prior.learns:
        values["train/prior_only"] = float(state.number >= run.network_rounds)
    values |= {"checkpoint/seconds": run.writer.seconds, "checkpoint/upload_seconds": run.writer.uploaded}
    pictures, drawn = config.report.pictures, {}
    due = pictures and (run.finished or position.round == 1 or position.round % pictures == 0)
    if due and (run.rank == 0 or run.engine.sharded):
        drawn = draw(run.engine, state.random, state.images)
    # From here on rank 0 alone works, and may fail.
    counts = {"images_seen": position.images_seen, "codes_seen": position.codes_seen}
    monitor.scalars(values, position.seen, **counts, round=state.number, step=position.step)
    if monitor.heartbeat:
        monitor.heartbeat.beat(values, seen=position.seen, phases=run.phases.total, checkpoint=run.writer.completed)
    if state.match:
        monitor.histogram("match/distances", state.match.distances, position.seen)
    for name, picture in drawn.items():
        monitor.picture(name, picture, position.seen)


def speed_values(run: Run, images: int) -> dict[str, float]:
    """Images/s of a round, the share of each phase, and arithmetic done."""
    phases = run.phases.seconds
    seconds = {phase: phases[phase] for phase in ("take", "learn", "match", "fit") if phase in phases}
    spent, device = sum(seconds.values()), run.accelerator.device
    values = {
        "speed/images_per_second": images / spent,
        "speed/images_per_second_and_rank": images / spent / run.world,
        "memory/peak_gb": peak_memory(device),
        **{f"share/{phase}": value / spent for phase, value in seconds.items()},
    }
    if "fit" in seconds:
        flops = fit_flops(run.flops, run.config.objective.forwards) * images / seconds["fit"]
        values["speed/fit_tflops"] = flops / 1e12
    return values


def draw(engine: Engine, random: RoundRandom, images: Tensor) -> dict[str, Image.Image]:
    """Pictures by name: samples f(z), resamples f(f(z)), restorations of images (m, *shape), and with classes a row of
    samples for each, in which a column has the same noise; for points a scatter. The latents are the same over the run,
    so that pictures compare. Collective where the network is sharded.
    """
    latents = replace(random, round=philox.SAMPLES).latents(torch.arange(64))
    once = engine.exported("", latents)
    once, twice, examples = once.cpu(), engine.exported("", once).cpu(), images.cpu()
    if once.ndim != 4:
        return {"samples": scatter([("f(z)", once), ("f(f(z))", twice)], behind=examples[:2000])}
    lines = [("clean", examples[:12])]
    for kind in KINDS:
        damaged = degrade(examples[:12], kind)
        repaired = engine.exported("", damaged.to(images.device)).cpu()
        lines += [(kind.replace("_", " "), damaged), ("repaired", repaired)]
    grids = {"samples": grid(once, columns=8), "samples-twice": grid(twice, columns=8)}
    if names := random.prior.labels[:CLASSES]:
        labels = torch.arange(len(names), device=images.device).repeat_interleave(8)
        latents = replace(random, round=philox.SAMPLES).latents(torch.arange(8).repeat(len(names)), labels)
        made = engine.exported("", latents).cpu().split(8)
        grids["classes"] = rows(list(zip(names, made, strict=True)))
    return grids | {"restorations": rows(lines)}
