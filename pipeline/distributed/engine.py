"""One network and its AdamW as the launcher's configuration runs them: alone, or on each rank under DDP.

`pipeline.distributed.zero` has the engine for DeepSpeed. Whatever the engine, its state goes in and out by parameter:
float32 weights and AdamW's two moments. So a checkpoint fits every world size and engine, and is never converted.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, of the parameter's shape
AdamState = dict[str, Tensor]  # `weight` and, from the first step on, MOMENTS of a parameter, each whole and float32


class Engine:
    """A training step is `forward` and `backward` for each micro-batch, then `step`."""

    deepspeed = False
    sharded = False  # whether no rank has the whole network (ZeRO-3), so that every forward is collective
    _ungraded: Callable[[], AbstractContextManager[Any]] = torch.inference_mode

    def __init__(
        self,
        accelerator: Accelerator,
        bare: nn.Module,  # float32, on the device, with its first weights or a checkpoint's
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,  # largest norm of the gradient; 0: none
        batch: int,  # images a step over all ranks
        accumulate: int = 1,  # micro-batches a step
        ema: float = 0.0,  # decay a step of the average of the weights; 0: none is kept
        compile: bool = False,  # and, on a GPU, replay as CUDA graphs
        shape: tuple[int, ...] = (),  # of a sample; (): DDP sums the first step of a process in other buckets
        ahead: bool | None = None,  # whether a step leaves its norm on the device; None: on a GPU
    ) -> None:
        """Collective."""
        self.accelerator, self.bare, self.accumulate = accelerator, bare, accumulate
        self.micro = batch // (accelerator.num_processes * accumulate)  # images per rank and micro-batch
        self.ema = deepcopy(bare).requires_grad_(False) if ema else None  # whole, float32, on every rank
        self._decay, self._clip = ema, clip
        self._graphs = compile and accelerator.device.type == "cuda"
        self.copied = threading.Event()  # not set while weights and moments are read in the background: a step waits
        self.copied.set()
        self._names = dict(bare.named_parameters())
        self.shapes = {name: tuple(value.shape) for name, value in self._names.items()}  # of the whole parameters
        ahead = accelerator.device.type == "cuda" if ahead is None else ahead
        self.ahead = ahead and accelerator.scaler is None and not self.deepspeed
        """Whether a step with a non-finite gradient is skipped on the device, without synchronizing the host."""
        fused = {"fused": True} if self.ahead else {}
        adam = torch.optim.AdamW(bare.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, **fused)
        if compile:
            bare.compile(mode="reduce-overhead" if self._graphs else None)
        self._prepare(adam)
        self._dtype = next(bare.parameters()).dtype  # of what the network takes
        self.described = f"{self._kind}, {accelerator.mixed_precision.replace('no', 'float32')}"
        if shape and self._kind == "DDP":
            # Else DDP arranges its buckets after the first step. With three or more ranks the bits of a sum depend on
            # its position in a bucket: a resumed run would not repeat them.
            self.network.eval()  # running statistics stay as they are
            self.network(torch.zeros(1, *shape, device=accelerator.device)).float().sum().backward()
            self.network.train()
            self.optimizer.zero_grad(set_to_none=True)

    def _prepare(self, adam: torch.optim.AdamW) -> None:
        self.network, self.optimizer = self.accelerator.prepare(self.bare, adam)
        self._adam: Any = self.optimizer
        while hasattr(self._adam, "optimizer"):  # the innermost one
            self._adam = self._adam.optimizer

    @property
    def _kind(self) -> str:
        return "DDP" if self.accelerator.num_processes > 1 else "one process"

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
        out: Tensor = (getattr(network, part) if part else network)(x.to(next(network.parameters()).dtype))
        self.bare.train()
        # Later evaluations overwrite the memory of a CUDA graph.
        return out.float().clone() if self._graphs else out.float()

    def _replay(self) -> None:
        """Let CUDA graphs overwrite what the network has returned up to now."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def exported(self, part: str, x: Tensor) -> Tensor:
        """f(x), or its `encode` or `decode`, by the network that is exported: the average, if one is kept. In float32,
        without gradient; codes are also computed in float32. Collective where the network is sharded.
        """
        exact = self.deepspeed or part == "encode"
        with torch.no_grad(), nullcontext() if exact else self.accelerator.autocast():
            return self._evaluate(self.bare if self.ema is None else self.ema, part, x)

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
        self.copied.wait()
        norm = self._step()
        broadcast(list(self.bare.buffers()))  # running statistics are rank 0's, so that all ranks sample alike
        if self.ema is not None and (self.ahead or math.isfinite(norm)):
            self._average(norm)
        return norm

    def _step(self) -> float | Tensor:
        on_device: Tensor = self.accelerator.clip_grad_norm_(self.bare.parameters(), self._clip or math.inf).detach()
        if self.ahead:
            self._adam.grad_scale, self._adam.found_inf = None, (~on_device.isfinite()).float()  # 1 skips
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)
            return on_device
        norm = float(on_device)
        # Accelerate's wrapper searches the disk for a package at every step; only a scaler needs the wrapper.
        scaled = self.accelerator.scaler is not None
        if math.isfinite(norm) or scaled:  # a scaler skips the step itself, and adapts
            (self.optimizer if scaled else self._adam).step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def _average(self, norm: float | Tensor) -> None:
        assert self.ema is not None
        with self.gathered():
            now = [value.detach().to(torch.float32) for value in self.bare.parameters()]
            averages: Any = list(self.ema.parameters())
            if isinstance(norm, Tensor):  # not at all after a step that was none
                change = torch._foreach_sub(now, averages)
                torch._foreach_mul_(change, torch.where(norm.isfinite(), 1 - self._decay, 0.0))
                torch._foreach_add_(averages, change)
            else:
                get_ema_multi_avg_fn(self._decay)(averages, now, None)
            for average, value in zip(self.ema.buffers(), self.bare.buffers(), strict=True):
                average.copy_(torch.where(norm.isfinite(), value, average) if isinstance(norm, Tensor) else value)

    def gathered(self) -> AbstractContextManager[Any]:
        """Collective: within this context the bare network's parameters hold the whole weights, for reading."""
        return nullcontext()

    def states(self) -> Iterator[tuple[str, AdamState]]:
        """Collective: yield each parameter's whole state in turn, on every rank. Copy what is to be kept."""
        for name, parameter in self._names.items():
            state = self._adam.state.get(parameter, {})
            yield name, {"weight": parameter.detach().float(), **{key: state[key] for key in MOMENTS if state}}

    @property
    def steps(self) -> int:
        """Number of steps that AdamW has made."""
        return max((int(state["step"]) for state in self._adam.state.values() if "step" in state), default=0)

    def restore(self, name: str, state: AdamState, steps: int) -> None:
        """Load one parameter's state; `steps` must be the same for all parameters."""
        parameter = self._names[name]
        with torch.no_grad():
            parameter.copy_(state["weight"])
        moments = {key: state[key].to(parameter.device, copy=True) for key in MOMENTS}
        where = parameter.device if self.ahead else "cpu"
        self._adam.state[parameter] = {"step": torch.tensor(float(steps), device=where), **moments}

    @property
    def scale(self) -> dict[str, float]:
        """The state of fp16's loss scaler; {} where there is none."""
        return dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler is not None else {}

    @scale.setter
    def scale(self, state: dict[str, float]) -> None:
        if self.accelerator.scaler is not None and "scale" in state:
            self.accelerator.scaler.load_state_dict(state)
