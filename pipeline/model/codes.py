"""The law of latents `codes`: a small flow draws a code from noise, and the decoder of f makes the latent of it.

f is an autoencoder, image -> code -> f(image). A rectified flow (arXiv 2209.03003) learns the law of the codes of the
data while f trains. A latent is z = decode(code) of a drawn code: near the data from the start, so that f(z) is one
application of f, and the match has only to repair what is left.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.constraints import POSITIVE, between, check_fields
from pipeline.errors import require
from pipeline.philox import LEARN, normal, uniform

DECAY = 0.999  # a step, of the average of the flow's weights, which is what draws
WINDOW = 20  # rounds over which the mean and the deviation of codes are averaged


@dataclass(kw_only=True, slots=True)
class CodesConfig:
    width: int = field(default=512, metadata=between(8, 2**13))
    """Hidden units of the flow."""
    depth: int = field(default=3, metadata=between(1, 64))
    """Residual layers of the flow."""
    passes: int = field(default=8, metadata=POSITIVE)
    """How often the flow learns from each image's code, each time with other noise."""
    batch: int = field(default=512, metadata=POSITIVE)
    """Codes a step."""
    lr: float = field(default=1e-3, metadata=POSITIVE)
    """Peak learning rate of the flow's AdamW; it rises and falls as train.lr does."""
    steps: int = field(default=8, metadata=between(1, 10**4))
    """Steps of Heun's method from noise to a code: 2 x steps - 1 evaluations of the flow."""

    def __post_init__(self) -> None:
        check_fields(self, "match.codes")


class CodeFlow(nn.Module):
    """The velocity of standardized codes on straight paths from noise (t = 0) to the data (t = 1)."""

    mean: Tensor
    deviation: Tensor
    steps: Tensor

    def __init__(self, dims: int, width: int, depth: int, steps: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dims + 32, width), nn.Linear(width, dims)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        nn.init.zeros_(self.outer.weight)
        for name, value in (
            ("mean", torch.zeros(dims)),
            ("deviation", torch.ones(dims)),
            ("steps", torch.tensor(steps)),
        ):
            self.register_buffer(name, value)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "CodeFlow":
        """The flow of that state. Raises KeyError, ValueError or RuntimeError for what is none."""
        width, depth = len(state["inner.weight"]), sum(name.endswith(".0.weight") for name in state)
        with torch.device("meta"):
            flow = cls(len(state["mean"]), width, depth, int(state["steps"]))
        flow.load_state_dict(state, assign=True)
        return flow.requires_grad_(False)

    def forward(self, codes: Tensor, time: Tensor) -> Tensor:
        """Velocity (n, dims) at standardized codes (n, dims) and times (n, 1)."""
        angles = time * torch.arange(1, 17, device=time.device) * (torch.pi / 2)
        hidden = self.inner(torch.cat([codes, angles.sin(), angles.cos()], dim=1))
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        velocity: Tensor = self.outer(hidden)
        return velocity

    def draw(self, noise: Tensor) -> Tensor:
        """The codes (n, dims) at the ends of the paths that begin at standard normals (n, dims)."""
        codes, times = noise, torch.linspace(0, 1, int(self.steps) + 1).tolist()
        for now, then in zip(times, times[1:], strict=False):
            step, velocity = then - now, self(codes, noise.new_full((len(noise), 1), now))
            if then < 1:
                ahead = self(codes + step * velocity, noise.new_full((len(noise), 1), then))
                velocity = (velocity + ahead) / 2
            codes = codes + step * velocity
        return codes * self.deviation + self.mean


class CodeLaw:
    """The flow while it learns: its weights, their average, AdamW's moments, and how many rounds it has seen."""

    def __init__(self, dims: int, config: CodesConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.rounds = config, seed, 0
        with torch.random.fork_rng(devices=[]):  # its first weights change none that are drawn besides
            torch.manual_seed(seed)
            self.flow = CodeFlow(dims, config.width, config.depth, config.steps).to(device)
        self.average = deepcopy(self.flow).requires_grad_(False)
        self.adam = torch.optim.AdamW(self.flow.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

    def learn(
        self,
        codes: Tensor,  # (n, dims) float32: those of a round's images, over all ranks
        share: float,  # of the peak learning rate
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        beat: Callable[[], None] = lambda: None,  # called at each step
    ) -> float:
        """Learn from the next round's codes. Returns the mean loss: per value, of a velocity against a straight path's.

        A function of the state, the codes and the seed.
        """
        count, dims = codes.shape
        keep = max(1 / (self.rounds + 1), 1 / WINDOW)
        spread = codes.std(0).clamp(min=1e-6)
        for flow in (self.flow, self.average):
            flow.mean.lerp_(codes.mean(0), keep)
            flow.deviation.lerp_(spread, keep)
        wanted = (codes - self.flow.mean) / self.flow.deviation
        ids = torch.arange(count)
        order = uniform(self.seed, self.rounds, ids, (self.config.passes,), stream=LEARN).argsort(dim=0).T.flatten()
        losses = []
        for number, rows in enumerate(order.split(self.config.batch)):
            drawn = normal(self.seed, self.rounds, rows + (number + 1) * count, (dims + 1,), codes.device, stream=LEARN)
            noise, time, target = drawn[:, :dims], drawn[:, dims:].sigmoid(), wanted[rows.to(codes.device)]
            with autocast():
                velocity = self.flow(time * target + (1 - time) * noise, time)
            loss = (velocity.float() - (target - noise)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.flow.parameters(), 1.0)
            for group in self.adam.param_groups:
                group["lr"] = self.config.lr * share
            self.adam.step()
            self.adam.zero_grad()
            made = int(self.adam.state[self.flow.outer.weight]["step"])
            average = get_ema_multi_avg_fn(min(DECAY, (1 + made) / (10 + made)))
            average(list(self.average.parameters()), [value.detach() for value in self.flow.parameters()], None)
            losses.append(loss.detach())
            beat()
        self.rounds += 1
        return float(torch.stack(losses).mean())

    def state(self) -> dict[str, Tensor]:
        """What draws, as `CodeFlow.of` takes it."""
        return self.average.state_dict()

    def dump(self) -> dict[str, Tensor]:
        """All that learning goes on from, on the CPU."""
        found = {f"flow.{name}": value for name, value in self.flow.state_dict().items()}
        found |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for name, parameter in self.flow.named_parameters():
            found |= {f"adam.{key}.{name}": value for key, value in self.adam.state.get(parameter, {}).items()}
        found["rounds"] = torch.tensor(self.rounds)
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `dump` returned. Raises KeyError, ValueError or RuntimeError for another flow's."""
        part: dict[str, dict[str, Tensor]] = {"flow": {}, "average": {}, "adam": {}}
        for name, value in saved.items():
            if name != "rounds":
                kind, _, rest = name.partition(".")
                part[kind][rest] = value
        self.flow.load_state_dict(part["flow"])
        self.average.load_state_dict(part["average"])
        for name, parameter in self.flow.named_parameters():
            kept = {key: part["adam"][f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            require((kept["exp_avg"].shape == parameter.shape, f"moments of {name} have another shape"))
            self.adam.state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}
            self.adam.state[parameter]["step"] = kept["step"].cpu()
        self.rounds = int(saved["rounds"])
