"""A network that a prior trains by itself: its weights, AdamW's moments and a moving average of the weights."""

from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from naign.distributed.optimizers import clip_and_step

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
BETAS = (0.9, 0.99)
CLIP = 1.0  # largest norm of the gradient
DECAY = 0.999  # of the average, per step
WARMUP = 200  # steps over which the learning rate rises


class Learner:
    """Trains a copy of `network`. Gradients are summed over ranks, so every rank has the same weights."""

    def __init__(self, network: nn.Module) -> None:
        self.network = deepcopy(network).requires_grad_(True)
        self.made = 0  # steps
        self.loss: float | Tensor = 0.0  # sum over the steps since the last report
        self.counted = 0  # these steps
        parameters = list(self.network.parameters())
        self.ahead = parameters[0].device.type != "cpu"  # whether norm and loss of a step stay on the device
        self.adam = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0, fused=self.ahead or None)
        for value in parameters:  # as AdamW itself begins, but before the first step
            moments = {name: torch.zeros_like(value) for name in MOMENTS}
            step = torch.zeros((), device=value.device if self.ahead else "cpu")
            self.adam.state[value] = {"step": step, **moments}

    def restart(self, network: nn.Module) -> None:
        """Train these weights instead, from the first step on."""
        self.network.load_state_dict(network.state_dict())
        self.report()  # that of the other weights
        for moments in self.adam.state.values():
            for name in MOMENTS:
                moments[name].zero_()
        self.resume_at(0)

    def resume_at(self, made: int) -> None:
        """Set the number of steps that weights and moments are of."""
        self.made = made
        for moments in self.adam.state.values():
            moments["step"].fill_(made)

    def step(
        self,
        loss: Tensor,  # this rank's part of the mean over all ranks
        rate: float,
        average: nn.Module,  # of the weights, which is moved too
        add: Callable[[Tensor], Tensor],  # the sum over ranks
    ) -> None:
        """Make a step of AdamW. Collective."""
        parameters = list(self.network.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        parts = [part.flatten() for part in gradients]
        whole = add(torch.cat([*parts, loss.detach().view(1)]))
        summed = whole[:-1].split([part.numel() for part in parts])
        for value, gradient in zip(parameters, summed, strict=True):
            value.grad = gradient.view_as(value)
        self.adam.param_groups[0]["lr"] = rate * min(1.0, (self.made + 1) / WARMUP)
        clip_and_step(self.adam, parameters, CLIP, ahead=self.ahead)
        self.made += 1
        move = get_ema_multi_avg_fn(min(DECAY, (1 + self.made) / (10 + self.made)))
        move(list(average.parameters()), [value.detach() for value in parameters], None)
        self.loss = self.loss + (whole[-1].double() if self.ahead else float(whole[-1]))
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
                named[f"{one}.{name}"] = self.adam.state[value][one]
        return named

    def load(self, state: Mapping[str, Tensor], made: int) -> None:
        """Go on from `tensors` after so many steps."""
        for name, value in self.tensors().items():
            value.copy_(state[name])
        self.resume_at(made)
