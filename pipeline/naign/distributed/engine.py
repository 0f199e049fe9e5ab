"""One network and its optimizer as the launcher's configuration runs them: alone, or on each rank under DDP.

`naign.distributed.zero` has the engine for DeepSpeed. Whatever the engine, its state goes in and out by parameter:
float32 weights and the optimizer's tensors. So a checkpoint fits every world size and engine, and is never converted.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from naign.distributed.muon import Muon, like, turn_shared, whole
from naign.distributed.optimizers import clip_and_step, find_optimizer
from naign.errors import InputError

State = dict[str, Tensor]  # `weight` of a parameter and, from the first step on, the optimizer's tensors, each whole


class Engine:
    """A training step is `forward` and `backward` for each micro-batch, then `step`."""

    gathers = False  # whether weights or their states are sharded, and `states` gathers them
    _kind = "one process"
    sharded = False  # whether no rank has the whole network (ZeRO-3, FSDP2), so that every forward is collective
    _ungraded: Callable[[], AbstractContextManager[Any]] = torch.inference_mode

    def __init__(
        self,
        accelerator: Accelerator,
        bare: nn.Module,  # float32, on the device, with its first weights or a checkpoint's
        settings: Any,  # section `train`: a TrainConfig
        *,
        shape: tuple[int, ...] = (),  # of a sample; (): DDP sums the first step of a process in other buckets
        ahead: bool | None = None,  # whether a step leaves its norm on the device; None: on a GPU
    ) -> None:
        """Collective."""
        on_gpu = accelerator.device.type == "cuda"
        self.accelerator = accelerator
        self.bare = bare
        self.accumulate = settings.accumulate
        self.micro = settings.batch // (accelerator.num_processes * self.accumulate)  # images per rank and micro-batch
        self.ema: nn.Module | None = None  # whole, float32, on every rank
        if settings.ema:
            self.ema = deepcopy(bare).requires_grad_(False)
        self._decay = settings.ema
        self._clip = settings.clip
        self._graphs = settings.compile and on_gpu
        self._shard()
        self._names = dict(bare.named_parameters())
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the whole parameters
        for name, value in self._names.items():
            self.shapes[name] = tuple(value.shape)
        if ahead is None:
            ahead = on_gpu
        fused = (ahead and not self.gathers) or None  # False would choose a slow loop over the weights
        build = find_optimizer(settings.optimizer)
        made = build(
            list(bare.parameters()),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        self.ahead = bool(fused and made.defaults.get("fused"))
        """Whether a step with a non-finite gradient is skipped on the device, without synchronizing the host."""
        if settings.compile:
            bare.compile(mode="reduce-overhead" if self._graphs else None)
        self._prepare(made)
        self._dtype = next(bare.parameters()).dtype  # of what the network takes
        self.described = f"{self._kind}, {accelerator.mixed_precision.replace('no', 'float32')}"
        if shape and self._kind == "DDP":
            # Else DDP arranges its buckets after the first step. With three or more ranks the bits of a sum depend on
            # its position in a bucket: a resumed run would not repeat them.
            self.network.eval()  # running statistics stay as they are
            blank = torch.zeros(1, *shape, device=accelerator.device)
            self.network(blank).float().sum().backward()
            self.network.train()
            self.optimizer.zero_grad(set_to_none=True)

    def _shard(self) -> None:
        """Distribute the weights over the ranks before the optimizer sees them."""

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.num_processes > 1:
            self._kind = "DDP"
            if isinstance(optimizer, Muon):
                optimizer.turn = turn_shared
        self.network, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        self._adam: Any = self.optimizer
        while hasattr(self._adam, "optimizer"):  # the innermost one
            self._adam = self._adam.optimizer

    def forward(self, x: Tensor) -> Tensor:
        """f(x) in float32, with gradient."""
        out: Tensor = self.network(x.to(self._dtype))
        return out.float()

    def sample(self, x: Tensor) -> Tensor:
        """f(x) in float32, without gradient, in evaluation mode. Collective where the network is sharded."""
        with self._ungraded():
            return self._evaluate(self.bare, "", x)

    def _evaluate(self, network: nn.Module, part: str, x: Tensor) -> Tensor:
        network.eval()
        self._replay()
        evaluate = getattr(network, part) if part else network
        out: Tensor = evaluate(x.to(next(network.parameters()).dtype))
        self.bare.train()
        out = out.float()
        if self._graphs:  # later evaluations overwrite the memory of a CUDA graph
            out = out.clone()
        return out

    def _replay(self) -> None:
        """Let CUDA graphs overwrite what the network has returned up to now."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def exported(self, part: str, x: Tensor) -> Tensor:
        """f(x), or its `encode` or `decode`, by the network that is exported: the average, if one is kept. In float32,
        computed in the precision of the weights, without gradient. Collective where the network is sharded.
        """
        network = self.bare if self.ema is None else self.ema
        with torch.no_grad():
            return self._evaluate(network, part, x)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; with a step's last they are averaged over ranks and micro-batches."""
        self.accelerator.backward(loss)

    def micro_batch(self) -> AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward: ranks communicate only in the last one of a step."""
        self._replay()
        context: AbstractContextManager[Any] = self.accelerator.accumulate(self.network)
        return context

    def step(self) -> float | Tensor:
        """Collective: clip, step, zero the gradients. Returns the gradient's norm before clipping, equal on all ranks;
        with `ahead` as a scalar on the device. If it is not finite, weights and moments stay as they are.
        """
        norm = self._step()
        broadcast(list(self.bare.buffers()))  # running statistics are rank 0's, so that all ranks sample alike
        if self.ema is not None and (self.ahead or math.isfinite(norm)):
            self._average(norm)
        return norm

    def _step(self) -> float | Tensor:
        # Accelerate's own clipping and stepping look for packages at every step.
        return clip_and_step(self._adam, self._names.values(), self._clip, ahead=self.ahead)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def _average(self, norm: float | Tensor) -> None:
        assert self.ema is not None
        with self.gathered():
            now = [whole(parameter.detach()).to(torch.float32) for parameter in self.bare.parameters()]
            averages: Any = list(self.ema.parameters())
            if isinstance(norm, Tensor):
                change = torch._foreach_sub(now, averages)
                # 0 after a skipped step
                torch._foreach_mul_(change, torch.where(norm.isfinite(), 1 - self._decay, 0.0))
                torch._foreach_add_(averages, change)
            else:
                get_ema_multi_avg_fn(self._decay)(averages, now, None)
            for average, value in zip(self.ema.buffers(), self.bare.buffers(), strict=True):
                if isinstance(norm, Tensor):
                    value = torch.where(norm.isfinite(), value, average)
                average.copy_(value)

    def gathered(self) -> AbstractContextManager[Any]:
        """Collective: within this context the bare network's parameters hold the whole weights, for reading."""
        return nullcontext()

    def states(self) -> Iterator[tuple[str, State]]:
        """Collective: yield each parameter's whole state in turn, on every rank. Copy what is to be kept."""
        for name, parameter in self._names.items():
            tensors = {"weight": whole(parameter.detach()).float()}
            for key, value in self._adam.state.get(parameter, {}).items():
                if key == "step":
                    continue
                if not getattr(value, "is_floating_point", bool)():
                    kept = f"the optimizer keeps '{key}' of a weight, which is not a tensor of floats"
                    raise InputError(f"{kept}: choose another")
                tensors[key] = whole(value)
            yield name, tensors

    @property
    def steps(self) -> int:
        """Number of steps that the optimizer has made; 1 for any number where it does not count them."""
        steps = 0
        for state in self._adam.state.values():
            steps = max(steps, int(state.get("step", 1)))
        return steps

    def _allocated(self, name: str) -> Any:
        """The optimizer's state of a parameter, which a step that changes nothing allocates if none was made yet."""
        if not self._adam.state:
            lr = self.optimizer.param_groups[0]["lr"]
            self.set_lr(0.0)
            for value in self._names.values():
                value.grad = torch.zeros_like(value)
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)
            self.set_lr(lr)
        return self._adam.state[self._names[name]]

    def state_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a parameter's state that `restore` needs."""
        shapes = {"weight": self.shapes[name]}
        for key, value in self._allocated(name).items():
            if key != "step":
                shapes[key] = tuple(value.shape)
        return shapes

    @torch.no_grad()
    def restore(self, name: str, state: State, steps: int) -> None:
        """Load one parameter's state; `steps` must be the same for all parameters."""
        kept = self._allocated(name)
        self._names[name].copy_(like(state["weight"], self._names[name]))
        for key, value in kept.items():
            if key != "step":
                value.copy_(like(state[key], value))
            else:
                kept[key] = torch.full_like(value, steps) if isinstance(value, Tensor) else steps
