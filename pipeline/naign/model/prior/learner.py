"""A network that a prior trains by itself: its weights, Muon's moments and a moving average of the weights."""

from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from naign.distributed.muon import MOMENTS
from naign.distributed.optimizers import OPTIMIZERS, clip_and_step

CLIP = 1.0  # largest norm of the gradient
DECAY = 0.999  # of the average, per step
WARMUP = 200  # steps over which the learning rate rises


class Learner:
    """Trains a copy of `network`. Gradients are summed over ranks, so every rank has the same weights."""

    def __init__(self, network: nn.Module) -> None:
        self.network = deepcopy(network).requires_grad_(True)
        self.made = 0  # steps
        self.begun = 0  # the step at which the present network began
        self.loss: float | Tensor = 0.0  # sum over the steps since the last report
        self.counted = 0  # these steps
        self.parameters = list(self.network.parameters())
        self.ahead = self.parameters[0].device.type != "cpu"  # whether the norm of a step stays on the device
        self.optimizer = OPTIMIZERS["muon"](self.parameters, fused=self.ahead or None, weight_decay=0.0)
        for group in self.optimizer.param_groups:
            kept = MOMENTS[:1] if group["turned"] else MOMENTS
            for value in group["params"]:  # as the optimizer itself begins, but before the first step
                state = {name: torch.zeros_like(value) for name in kept}
                self.optimizer.state[value] = {"step": torch.zeros((), device=value.device), **state}

    def step(
        self,
        loss: Tensor,  # this rank's part of the mean over all ranks
        rate: float,
        average: nn.Module,  # of the weights, which is moved too
        add: Callable[[Tensor], Tensor],  # the sum over ranks
    ) -> None:
        """Make a step of Muon. Collective."""
        gradients = torch.autograd.grad(loss, self.parameters)
        parts = [part.flatten() for part in gradients]
        whole = add(torch.cat([*parts, loss.detach().view(1)]))
        summed = whole[:-1].split([part.numel() for part in parts])
        for value, gradient in zip(self.parameters, summed, strict=True):
            value.grad = gradient.view_as(value)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.made - self.begun + 1) / WARMUP)
        clip_and_step(self.optimizer, self.parameters, CLIP, ahead=self.ahead)
        self.made += 1
        made = self.made - self.begun
        decay = min(DECAY, (1 + made) / (10 + made))
        get_ema_multi_avg_fn(decay)(list(average.parameters()), self.parameters, None)
        self.loss = self.loss + whole[-1].double()
        self.counted += 1

    def report(self) -> float:
        """The mean loss since the last report."""
        mean = float(self.loss) / max(1, self.counted)
        self.loss = 0.0
        self.counted = 0
        return mean

    def tensors(self) -> dict[str, Tensor]:
        """The weights and their moments, by name."""
        named = {}
        for name, value in self.network.named_parameters():
            named[f"trained.{name}"] = value.detach()
            for one in MOMENTS:
                if one in self.optimizer.state[value]:
                    named[f"{one}.{name}"] = self.optimizer.state[value][one]
        return named

    def load(self, state: Mapping[str, Tensor], made: int) -> None:
        """Go on from `tensors` after so many steps."""
        for name, value in self.tensors().items():
            value.copy_(state[name])
        self.made = made
        for moments in self.optimizer.state.values():
            moments["step"].fill_(made)
