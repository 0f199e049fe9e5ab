"""The law of latents `codes`: a small flow draws a code from noise, and the decoder of f makes the latent of it.

f is an autoencoder, image -> code -> f(image). The flow learns the law of the codes of the data while f trains, and
then alone, with f as it is. A latent is z = decode(code) of a drawn code: it is near the data already, f(z) is one
application of f, and the match has only to repair what is left.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.errors import InputError, one_line, require
from pipeline.model.flow import MOST_STEPS, CodeFlow
from pipeline.philox import LEARN, normal, uniform
from pipeline.settings.constraints import POSITIVE, between, check_fields

DECAY = 0.999  # a step, of the average of the flow's weights, which is what draws
WARMUP = 200  # steps over which the learning rate rises
WINDOW = 5  # rounds over which the mean and the covariance of codes are averaged, while f moves them


@dataclass(kw_only=True, slots=True)
class CodesConfig:
    width: int = field(default=512, metadata=between(8, 2**13))
    """Width of the flow: hidden units for a dense code, channels at full resolution for a spatial code."""
    depth: int = field(default=3, metadata=between(1, 64))
    """Depth of the flow: residual layers for a dense code; for a spatial code, blocks per resolution on each side of a
    U-Net."""
    directions: int = field(default=128, metadata=between(1, 2**13))
    """How many leading principal directions of the codes' channels are modelled; the others stay at their mean."""
    components: int = field(default=0, metadata=between(0, 10**4))
    """Gaussians of a mixture that follows the codes while f trains and replaces the flow. 0: the flow."""
    passes: int = field(default=8, metadata=between(1, 10**4))
    """How often the flow learns from each image's code, each time with other noise."""
    batch: int = field(default=512, metadata=POSITIVE)
    """Codes per step, over all ranks."""
    lr: float = field(default=2e-3, metadata=POSITIVE)
    """Peak learning rate of the flow's AdamW: a short warm-up, then a cosine to zero at the end of the run."""
    begin: float = field(default=0.5, metadata=between(0, 0.99))
    """Share of train.images before which only the mean and the covariance of the codes are tracked, and codes are drawn
    from that Gaussian. Use 0 if matched latents are to move f."""
    alone: float = field(default=0.5, metadata=between(0, 0.99))
    """Share of train.images, at the end, over which only the law learns and f is frozen."""
    steps: int = field(default=8, metadata=between(1, MOST_STEPS))
    """Steps of Heun's method from noise to a code: 2 x steps - 1 evaluations of the flow."""

    def __post_init__(self) -> None:
        check_fields(self, "match.codes")
        if self.begin + self.alone > 1 + 1e-9:
            what = f"match.codes.begin is {self.begin:g} and match.codes.alone {self.alone:g}"
            raise InputError(
                f"{what}: between f's last step and the flow's first nothing would learn; at most 1 together"
            )


class CodeLaw:
    """The flow in training: its weights, their average, AdamW's moments, and its progress."""

    def __init__(self, shape: tuple[int, ...], config: CodesConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed = config, seed
        self.ahead = device.type != "cpu"  # whether norm and loss of a step stay on the device
        self.rounds, self.done = 0, 0  # rounds learned from, and steps made of the next one
        self.sum: float | Tensor = 0.0  # of the losses of those steps
        self.loss = math.nan  # mean of the last whole round's
        with torch.random.fork_rng(devices=[]):  # its first weights change none that are drawn besides
            torch.manual_seed(seed)
            self.flow = CodeFlow(shape, config.width, config.depth, config.steps, config.directions)
        self.flow.to(device)
        self.average = deepcopy(self.flow).requires_grad_(False)
        self.adam = torch.optim.AdamW(self.flow.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

    def begun(self, share: float) -> bool:
        """Whether the flow learns from a round that begins after that share of the run."""
        return share >= self.config.begin

    def learn(
        self,
        codes: Tensor,  # (n, *shape) float32: those of a round's images, of all ranks
        share: float,  # of the run that lies behind
        settled: int = 0,  # rounds since which f has not changed
        *,
        covers: float = 0.0,  # share of the run that this round is: the learning rate falls within it, too
        rank: int = 0,
        world: int = 1,
        add: Callable[[Tensor], Tensor] = lambda value: value,  # its sum over all ranks
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[None]:
        """Learn from the next round's codes, step by step; the loss is that per value. Collective.

        Before `begin` there are no steps, and the loss stays not a number.
        A function of the state, the codes and the seed, whatever the number of ranks, but for the order in which
        gradients are added.
        """
        if not self.done:
            keep = max(1 / (self.rounds + 1), 1 / (WINDOW + settled))
            values = codes.transpose(0, 1).flatten(1)
            self.flow.follow(values.mean(1), values.cov(), keep)
            for name, value in self.flow.named_buffers():
                self.average.get_buffer(name).copy_(value)
        if not self.begun(share):  # and a round that a shorter run stopped in is not gone on with
            self.rounds, self.done, self.sum = self.rounds + 1, 0, 0.0
            return
        wanted = self.flow.whiten(codes)
        ids = torch.arange(len(codes))
        order = uniform(self.seed, self.rounds, ids, (self.config.passes,), stream=LEARN).argsort(dim=0).T.flatten()
        batches = order.split(self.config.batch)
        while self.done < len(batches):
            now = share + covers * self.done / len(batches)
            learned = (now - self.config.begin) / (1 - self.config.begin)  # share of what the flow learns from
            rate = self.config.lr * (1 + math.cos(math.pi * learned)) / 2
            rows = batches[self.done]
            first, last = (len(rows) * part // world for part in (rank, rank + 1))
            mine = rows[first:last]
            loss = self._loss(wanted[mine.to(codes.device)], mine + (self.done + 1) * len(codes), autocast)
            self.sum += self._step(loss / (len(rows) * wanted[0].numel()), rate, add)
            self.done += 1
            yield
        self.loss, self.sum = float(self.sum) / len(batches), 0.0
        self.rounds, self.done = self.rounds + 1, 0

    def _loss(self, wanted: Tensor, numbers: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        """Sum of the squared errors of the velocity at random times of straight paths that end at `wanted`."""
        drawn = normal(self.seed, self.rounds, numbers, (math.prod(wanted.shape[1:]) + 1,), wanted.device, stream=LEARN)
        noise, time = drawn[:, :-1].view_as(wanted), drawn[:, -1].sigmoid()
        along = time.view(-1, *(1,) * (wanted.ndim - 1))
        with autocast():
            velocity = self.flow(along * wanted + (1 - along) * noise, time)
        loss: Tensor = (velocity.float() - (wanted - noise)).square().sum()
        return loss

    def _step(self, loss: Tensor, rate: float, add: Callable[[Tensor], Tensor]) -> float | Tensor:
        """Returns the loss over all ranks."""
        parameters = list(self.flow.parameters())
        parts = torch.autograd.grad(loss, parameters)
        whole = add(torch.cat([*(part.flatten() for part in parts), loss.detach().view(1)]))
        norm = whole[:-1].norm()
        gradient = whole[:-1] * ((1 / (norm + 1e-6)).clamp(max=1) if self.ahead else min(1.0, 1 / (float(norm) + 1e-6)))
        for value, part in zip(parameters, gradient.split([value.numel() for value in parameters]), strict=True):
            value.grad = part.view_as(value)
        for group in self.adam.param_groups:
            group["lr"] = rate * min(1.0, (self._made + 1) / WARMUP)
        self.adam.step()
        average = get_ema_multi_avg_fn(min(DECAY, (1 + self._made) / (10 + self._made)))
        average(list(self.average.parameters()), [value.detach() for value in parameters], None)
        return whole[-1].double() if self.ahead else float(whole[-1])

    @property
    def _made(self) -> int:
        return max((int(state["step"]) for state in self.adam.state.values()), default=0)

    def state(self) -> dict[str, Tensor]:
        """The state of the flow that draws codes, as `CodeFlow.of` takes it."""
        return self.average.state_dict()

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Begin from the state of another run's law, if it is one of this shape."""
        if {name: value.shape for name, value in state.items()} == {k: v.shape for k, v in self.state().items()}:
            kept = {**state, "steps": self.flow.steps}  # which is this run's setting
            self.flow.load_state_dict(kept)
            self.average.load_state_dict(kept)

    def dump(self) -> dict[str, Tensor]:
        """The state from which learning resumes, on the CPU."""
        found = {f"flow.{name}": value for name, value in self.flow.state_dict().items()}
        found |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for name, parameter in self.flow.named_parameters():
            found |= {f"adam.{key}.{name}": value for key, value in self.adam.state.get(parameter, {}).items()}
        found["progress"] = torch.tensor([self.rounds, self.done, float(self.sum), self.loss], dtype=torch.float64)
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Resume from what `dump` returned. Raises KeyError or ValueError for another flow's."""
        part: dict[str, dict[str, Tensor]] = {"flow": {}, "average": {}, "adam": {}}
        for name, value in saved.items():
            if name != "progress":
                kind, _, rest = name.partition(".")
                part[kind][rest] = value
        try:
            self.flow.load_state_dict(part["flow"])
            self.average.load_state_dict(part["average"])
        except RuntimeError as error:
            raise ValueError(one_line(error)) from None
        for name, parameter in self.flow.named_parameters():
            if not part["adam"]:  # no step was made yet
                break
            kept = {key: part["adam"][f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            same = all(kept[key].shape == parameter.shape for key in ("exp_avg", "exp_avg_sq"))
            require((same, f"moments of {name} have another shape"))
            self.adam.state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}
            self.adam.state[parameter]["step"] = kept["step"].cpu()
        rounds, done, self.sum, self.loss = saved["progress"].tolist()
        self.rounds, self.done = int(rounds), int(done)
