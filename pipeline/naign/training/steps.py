"""The steps of a round: which rows, at which learning rate, and what their losses say."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from naign import philox
from naign.checkpoint.writer import newest_checkpoint
from naign.config import Config, TrainConfig
from naign.distributed.ranks import total
from naign.errors import Diverged

if TYPE_CHECKING:
    from naign.training.trainer import Trainer

log = logging.getLogger("naign.fit")

REMEDY = "lower train.lr, set train.clip or raise the precision, in a new --run.path"  # for a run that diverged
BAD_STEPS = 10  # skipped in a row, after which the run has diverged


def rows_of_steps(config: Config, round: int, *, rank: int, world: int) -> Tensor:
    """Rows (steps, batch / world) int64 of a round that `rank` trains on in each step, the passes one after the other.

    The round is cut into as many strata as a step has images, and each step takes one row of each stratum. So a rank
    trains on the rows that it has read, and the images of a step are the same on every world size. In pass p the number
    of row r is r + p * match.round.
    """
    size = config.match.round
    strata = config.train.batch
    drawn = philox.uniform(
        config.seed,
        round,
        torch.arange(size),
        (config.train.passes,),
        stream=philox.ORDER,
    )
    order = drawn.T.view(config.train.passes, strata, -1).argsort(dim=2, stable=True)  # (passes, strata, steps)
    first = torch.arange(strata)[:, None] * order.shape[2]
    passed = torch.arange(config.train.passes)[:, None, None] * size
    numbers = (order + first + passed).transpose(1, 2).flatten(0, 1)
    share = strata // world
    return numbers[:, rank * share : (rank + 1) * share].contiguous()


def learning_rate(config: TrainConfig, seen: int, budget: int) -> float:
    """Linear warm-up over at most half the budget, then a cosine from lr to lr_end; all counted in images."""
    warmup = min(config.warmup, budget // 2)
    if seen < warmup:
        return config.lr * (seen + config.batch) / (warmup + config.batch)
    share = min(1.0, (seen - warmup) / max(1, budget - warmup))
    left = 0.5 * (1 + math.cos(math.pi * share))
    return config.lr_end + (config.lr - config.lr_end) * left


class StepLosses:
    """The losses of a round's steps, but for steps that were skipped since their gradient was not finite.

    With steps launched ahead of the device, the newest step is read after the next launch: reading its norm waits.
    """

    def __init__(self, run: "Trainer") -> None:
        self._run = run
        self._present: dict[str, Tensor] = {}  # of the step that is being made
        self._unread: list[tuple[Tensor | float, dict[str, Tensor]]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the losses of a micro-batch."""
        for name, value in terms.items():
            mean = value.detach() / self._run.engine.accumulate
            self._present[name] = self._present.get(name, 0.0) + mean

    def end_step(self, norm: Tensor | float) -> None:
        """End a step with its gradient's norm. Raises Diverged after BAD_STEPS skipped steps in a row."""
        self._present["gradient_norm"] = torch.as_tensor(norm)
        self._unread.append((norm, self._present))
        self._present = {}
        self._read(left=1 if self._run.engine.ahead else 0)

    def _read(self, left: int) -> None:
        state = self._run.state
        while len(self._unread) > left:
            norm, losses = self._unread.pop(0)
            if math.isfinite(norm):
                state.bad_steps = 0
                self._steps += 1
                for name, value in losses.items():
                    self._sums[name] = self._sums.get(name, 0.0) + value
                continue
            state.bad_steps += 1
            state.skipped += 1
            if self._run.rank == 0:
                log.warning("a step of round %d: the loss or its gradient is not finite: skipped", state.round)
            if state.bad_steps >= BAD_STEPS:
                self._run.writer.join()
                newest = newest_checkpoint(Path(self._run.config.run.path) / "checkpoints") or "not there yet"
                bad = f"{state.bad_steps} steps in a row were not finite, the last in round {state.round}"
                raise Diverged(f"{bad}; the newest checkpoint is {newest}: {REMEDY}")

    def means(self) -> dict[str, float]:
        """Mean of each loss over the steps and all ranks, as loss/NAME. Collective."""
        self._read(left=0)
        names = sorted(self._sums)
        means = [float(self._sums[name]) / self._steps / self._run.world for name in names]
        return {f"loss/{name}": value for name, value in zip(names, total(means, self._run.accelerator), strict=True)}
