"""Fit: a few passes of SGD over one round's images and the latents that they are matched with."""

import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoint.writer import newest_checkpoint
from pipeline.config import TrainConfig
from pipeline.distributed.ranks import total
from pipeline.errors import Diverged, Stopped
from pipeline.model.objectives import losses
from pipeline.training.round import Run, Work

log = logging.getLogger("naign.fit")


def fit(run: Run, work: Work, budget: int) -> dict[str, float]:
    """Collective: a few passes of SGD on (image, its latent); the mean of each loss over steps and ranks, and more.

    Raises Stopped between two steps; Diverged after too many steps whose gradient is not finite.
    """
    config, engine, position = run.config, run.engine, run.position
    size = config.match.round
    steps = steps_of(
        config.seed,
        work.number,
        size=size,
        batch=config.train.batch,
        passes=config.train.passes,
        rank=run.rank,
        world=run.world,
        began=work.began,
    )
    poll, lr = run.poll("fit"), 0.0
    while position.done < len(steps):
        run.watch.beat()
        if poll():
            raise Stopped
        lr = learning_rate(config.train, position.images_seen, budget)
        engine.set_lr(lr)
        turn = position.done // (size // config.train.batch)
        found: dict[str, Tensor] = {}
        for rows in steps[position.done].split(engine.micro):
            # Numbers that no other image of the round has, in any pass: for fresh latents, fresh noise and jitter.
            fresh, here = rows + size * turn, rows - work.first
            with engine.micro_batch():
                terms = losses(
                    config.objective,
                    engine.forward,
                    work.images[here],
                    latents_of(work, here, fresh) if config.objective.needs_latents else None,
                    damaged=work.draw.damaged(work.images[here], fresh) if config.objective.needs_damaged else None,
                    frozen=engine.bare,
                    normals=partial(work.draw.normals, fresh),
                    perceived=run.perceived,
                )
                engine.backward(terms["total"])
            for name, value in terms.items():
                value = value.detach() / engine.accumulate if engine.accumulate > 1 else value.detach()
                found[name] = found[name] + value if name in found else value
        norm = engine.step()
        found |= {"gradient": torch.tensor(norm), "steps": torch.tensor(1.0)}
        if math.isfinite(norm):
            run.bad = 0
            for name, value in found.items():
                work.sums[name] = work.sums.get(name, torch.zeros_like(value)) + value
        else:
            skip(run, work)
        position.done += 1
        position.step += 1
        position.images_seen += config.train.batch
        run.monitor.advance(config.train.batch)
    names = sorted(name for name in work.sums if name != "steps")
    count = float(work.sums["steps"]) if names else 0.0
    means = total([float(work.sums[name]) / count / run.world for name in names], run.accelerator)
    return {f"loss/{name}": mean for name, mean in zip(names, means, strict=True)} | {"train/lr": lr}


def latents_of(work: Work, here: Tensor, fresh: Tensor) -> Tensor:
    """Those that images are matched with, or new ones: `here` are rows of the work's images, `fresh` their numbers."""
    return work.draw.jittered(work.match.ids[here], fresh) if work.match else work.draw.latents(fresh)


def skip(run: Run, work: Work) -> None:
    """Count a step that was not made. Raises Diverged after train.bad_steps of them in a row."""
    run.bad += 1
    run.position.skipped += 1
    if run.rank == 0:
        log.warning("step %d: the loss or its gradient is not finite: skipped", run.position.step)
    if run.bad >= run.config.train.bad_steps:
        run.writer.join()
        newest = newest_checkpoint(Path(run.config.run.path) / "checkpoints") or "not there yet"
        raise Diverged(
            f"{run.bad} steps in a row had a loss or gradient that is not finite, the last in round {work.number}; the "
            f"newest checkpoint is {newest}: lower train.lr, set train.clip or raise the precision, in a new --run.path"
        )


def learning_rate(config: TrainConfig, seen: int, budget: int) -> float:
    """Linear warm-up over at most half the budget, then a cosine from lr to lr_end; counted in images."""
    warmup = min(config.warmup, budget // 2)
    if seen < warmup:
        return config.lr * (seen + config.batch) / (warmup + config.batch)
    share = (seen - warmup) / max(1, budget - warmup)
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def pass_order(count: int, *key: int) -> Tensor:
    """A permutation (count,) that depends on the arguments alone: it sorts raw draws, which NumPy never changes."""
    return torch.from_numpy(np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable"))


def steps_of(
    seed: int,
    round: int,
    *,
    size: int,  # images of the round
    batch: int,  # images a step, over all ranks
    passes: int,
    rank: int,
    world: int,
    began: int,  # the world size that began the round: as a rule this one
) -> Tensor:
    """The rows of the round (steps, batch / world) int64 that `rank` fits in each step.

    Every pass has each image of the round once, over all ranks. A rank fits its own contiguous share of the round, in
    an order of its own; in a round that another world size began every step keeps its images, which are dealt anew.
    """
    share = size // began
    ranks = [rank] if began == world else range(began)
    passed = [
        torch.stack([other * share + pass_order(share, seed, round, turn, other) for other in ranks])
        for turn in range(passes)
    ]
    steps = torch.cat([rows.view(len(ranks), -1, batch // began).transpose(0, 1).flatten(1) for rows in passed])
    return steps if began == world else steps.view(len(steps), world, -1)[:, rank]
