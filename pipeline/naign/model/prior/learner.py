"""A network in training beside f: its weights, AdamW's moments, and the progress within a round."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
BETAS = (0.9, 0.99)
DECAY = 0.999  # a step, of an average of the weights
WARMUP = 200  # steps over which the learning rate rises


class Learner:
    """Trains a copy of `network`. Gradients are summed over ranks, so every rank has the same weights."""

    def __init__(self, network: nn.Module) -> None:
        self.network = deepcopy(network).requires_grad_(True)
        self.done = 0  # steps of the round
        self.sum: float | Tensor = 0.0  # of their losses
        self.made = 0  # steps of all rounds
        parameters = list(self.network.parameters())
        self.ahead = parameters[0].device.type != "cpu"  # whether norm and loss of a step stay on the device
        self.adam = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0)
        for value in parameters:  # as AdamW itself begins, but before the first step
            moments = {name: torch.zeros_like(value) for name in MOMENTS}
            self.adam.state[value] = {"step": torch.tensor(0.0), **moments}

    def restart(self, network: nn.Module) -> None:
        """Train these weights instead, from the first step on."""
        self.network.load_state_dict(network.state_dict())
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
        """A step of AdamW, with the gradient's norm clipped to 1. Collective."""
        parameters = list(self.network.parameters())
        parts = torch.autograd.grad(loss, parameters)
        whole = add(torch.cat([*(part.flatten() for part in parts), loss.detach().view(1)]))
        norm = whole[:-1].norm()
        gradient = whole[:-1] * ((1 / (norm + 1e-6)).clamp(max=1) if self.ahead else min(1.0, 1 / (float(norm) + 1e-6)))
        for value, part in zip(parameters, gradient.split([value.numel() for value in parameters]), strict=True):
            value.grad = part.view_as(value)
        self.adam.param_groups[0]["lr"] = rate * min(1.0, (self.made + 1) / WARMUP)
        self.adam.step()
        self.made += 1
        move = get_ema_multi_avg_fn(min(DECAY, (1 + self.made) / (10 + self.made)))
        move(list(average.parameters()), [value.detach() for value in parameters], None)
        self.sum += whole[-1].double() if self.ahead else float(whole[-1])
        self.done += 1

    def tensors(self) -> dict[str, Tensor]:
        """The weights and their moments, by name."""
        named, states = dict(self.network.named_parameters()), self.adam.state
        moments = {f"{one}.{name}": states[value][one] for one in MOMENTS for name, value in named.items()}
        return {f"trained.{name}": value.detach() for name, value in named.items()} | moments
