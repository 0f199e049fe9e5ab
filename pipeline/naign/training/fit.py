"""Fit: a few passes of SGD over a round's images and the latents that they are matched with."""

import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from naign.checkpoint.writer import newest_checkpoint
from naign.config import Config, TrainConfig
from naign.distributed.ranks import total
from naign.distributed.signals import StopPoll
from naign.errors import Diverged, Stopped
from naign.model.losses import Batch, choose_distance, compute_losses
from naign.training.round import REMEDY, RoundState
from naign.training.run import Run

log = logging.getLogger("naign.fit")
FALL = 0.2  # wsd: the rate is constant for the first 80 % of the images after warm-up and falls over the last 20 %
BAD_STEPS = 10  # skipped in a row, after which the run has diverged
Step = tuple[int, Tensor | float, dict[str, Tensor]]
"""A step that was made: its number, the norm of its gradient, and the sum of each loss over its micro-batches."""


def fit(run: Run, state: RoundState) -> dict[str, float]:
    """Train on (image, its latent) for train.passes passes. Collective.

    Returns each loss's mean over steps and ranks, and the last learning rate. Raises Stopped, or Diverged as `settle`.
    """
    config, engine, position, random, match = run.config, run.engine, run.position, state.random, state.match
    size, step_size, objective, device = config.match.round, config.train.batch, config.objective, state.images.device
    began = state.world_size_at_start
    steps = steps_of(config, state.number, rank=run.rank, world=run.world, world_size_at_start=began)
    # Uploaded once a round: an upload a step would make the launches wait for the device.
    steps, ids = steps.to(device), match.ids.to(device) if match else None
    distance = choose_distance(objective, run.perceived)
    stop_requested, lr, unread = StopPoll(run.stop), 0.0, list[Step]()
    while position.done < len(steps):
        run.watchdog.beat()
        if stop_requested():
            settle(run, state, unread)
            raise Stopped
        lr = learning_rate(config.train, position.images_seen, run.network_rounds * size * config.train.passes)
        engine.set_lr(lr)
        passes_done = position.done // (size // step_size)
        sums: dict[str, Tensor] = {}
        for rows in steps[position.done].split(engine.micro):
            # Fresh latents and noise are drawn by numbers that are unique within the round, passes included.
            numbers, local = rows + size * passes_done, rows - state.first
            images = state.images[local]
            with engine.micro_batch():
                drawn = numbers if ids is None else ids[local]  # fresh ones without a match
                batch = Batch(
                    images=images,
                    latents=random.latents(drawn) if objective.needs_latents else None,
                    damaged=random.damaged(images, numbers) if objective.needs_damaged else None,
                    distance=distance,
                    frozen=engine.bare,
                    normals=partial(random.normals, numbers),
                )
                terms = compute_losses(objective, engine.forward, batch)
                engine.backward(terms["total"])
            for name, value in terms.items():
                value = value.detach() / engine.accumulate
                sums[name] = sums[name] + value if name in sums else value
        unread.append((position.step, engine.step(), sums))
        settle(run, state, unread, 1 if engine.ahead else 0)
        position.done += 1
        position.step += 1
        position.images_seen += step_size
        run.monitor.advance(step_size)
    settle(run, state, unread)
    return means(run, state) | {"train/lr": lr}


def settle(run: Run, state: RoundState, unread: list[Step], left: int = 0) -> None:
    """Add the losses of all unread steps but the last `left` to the round's sums, and count skipped steps.

    With steps launched ahead, the last one is read after the next launch, since reading its norm waits for the device.
    Raises Diverged after BAD_STEPS skipped steps in a row.
    """
    position = run.position
    while len(unread) > left:
        number, norm, sums = unread.pop(0)
        if math.isfinite(norm):
            position.bad_steps = 0
            for name, value in (sums | {"gradient": torch.as_tensor(norm), "steps": torch.tensor(1.0)}).items():
                state.sums[name] = state.sums.get(name, torch.zeros_like(value)) + value
            continue
        position.bad_steps += 1
        position.skipped += 1
        if run.rank == 0:
            log.warning("step %d: the loss or its gradient is not finite: skipped", number)
        if position.bad_steps >= BAD_STEPS:
            run.writer.join()
            newest = newest_checkpoint(Path(run.config.run.path) / "checkpoints") or "not there yet"
            bad = f"{position.bad_steps} steps in a row were not finite, the last in round {state.number}"
            raise Diverged(f"{bad}; the newest checkpoint is {newest}: {REMEDY}")


def means(run: Run, state: RoundState) -> dict[str, float]:
    """Mean of each loss over the round's steps and all ranks. Collective."""
    names = sorted(name for name in state.sums if name != "steps")
    count = float(state.sums["steps"]) if names else 0.0
    values = total([float(state.sums[name]) / count / run.world for name in names], run.accelerator)
    return {f"loss/{name}": value for name, value in zip(names, values, strict=True)}


def learning_rate(config: TrainConfig, seen: int, budget: int) -> float:
    """Linear warm-up over at most half the budget, then train.schedule from lr to lr_end; all counted in images."""
    warmup = min(config.warmup, budget // 2)
    if seen < warmup:
        return config.lr * (seen + config.batch) / (warmup + config.batch)
    share = min(1.0, (seen - warmup) / max(1, budget - warmup))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * share))
    else:  # wsd
        left = 1 - max(0.0, 1 - (1 - share) / FALL) ** 0.5
    return config.lr_end + (config.lr - config.lr_end) * left


def pass_order(count: int, *key: int) -> Tensor:
    """A permutation (count,) int64, a function of the arguments: it sorts raw draws, which NumPy never changes."""
    return torch.from_numpy(np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable"))


def steps_of(config: Config, number: int, *, rank: int, world: int, world_size_at_start: int) -> Tensor:
    """Rows of round `number` (steps, batch / world) int64 that `rank` trains on in each step.

    Every pass visits each image of the round once, over all ranks. Each rank shuffles its contiguous share. In a round
    that another world size started, the images of each step stay the same and are divided among the present ranks.
    """
    resized = world_size_at_start != world
    share = config.match.round // world_size_at_start
    ranks = range(world_size_at_start) if resized else [rank]

    def rows_of(turn: int) -> Tensor:
        rows = torch.stack([other * share + pass_order(share, config.seed, number, turn, other) for other in ranks])
        return rows.view(len(ranks), -1, config.train.batch // world_size_at_start).transpose(0, 1).flatten(1)

    steps = torch.cat([rows_of(turn) for turn in range(config.train.passes)])
    return steps.view(len(steps), world, -1)[:, rank] if resized else steps
