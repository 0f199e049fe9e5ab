"""One network and its AdamW as the launcher's configuration runs them: alone, DDP, or DeepSpeed ZeRO 0 to 3.

The only file that imports DeepSpeed. Whatever the engine, its state goes in and out by parameter: float32 weights and
AdamW's two moments of the whole parameter (DeepSpeed's tensor_fragment API assembles them from the ranks' partitions).
So a checkpoint does not depend on world size and engine, and is never converted.
"""

import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from filelock import FileLock
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.distributed.versions import refuse
from pipeline.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, of the parameter's shape
AdamState = dict[str, Tensor]  # `weight` and, from the first step on, MOMENTS of a parameter, each whole and float32


class Engine:
    """A training step is `forward` and `backward` for each micro-batch, then `step`."""

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
        compile: bool = False,
        graphs: bool = False,  # compile, and replay as CUDA graphs on a GPU
        shape: tuple[int, ...] = (),  # of a sample; (): DDP sums the first step of a process in other buckets
        ahead: bool | None = None,  # whether a step leaves its norm on the device; None: on a GPU
    ) -> None:
        """Collective. Raises InputError where the launcher's configuration contradicts these."""
        world = accelerator.num_processes
        assert batch % (world * accumulate) == 0
        self.accelerator, self.bare, self.accumulate = accelerator, bare, accumulate
        self.micro = batch // (world * accumulate)  # images per rank and micro-batch
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.stage = 0  # DeepSpeed's ZeRO stage
        self.ema = deepcopy(bare).requires_grad_(False) if ema else None  # whole, float32, on every rank
        self._decay, self._clip, self._waiting, self._graphs = ema, clip, 0, graphs
        self.copied = threading.Event()  # not set while weights and moments are read in the background: a step waits
        self.copied.set()
        self._names = dict(bare.named_parameters())
        self.shapes = {name: tuple(value.shape) for name, value in self._names.items()}  # of the whole parameters
        ahead = accelerator.device.type == "cuda" if ahead is None else ahead
        self.ahead = ahead and not self.deepspeed and accelerator.scaler is None
        """Whether `step` decides on the device whether to step, and does not wait for it."""
        fused = {"fused": True} if self.ahead else {}
        adam = torch.optim.AdamW(bare.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, **fused)
        if self.deepspeed:
            _configure(accelerator, micro=self.micro, accumulate=accumulate, clip=clip)
            self.stage = int(accelerator.state.deepspeed_plugin.zero_stage)
        elif compile or graphs:
            bare.compile(mode="reduce-overhead" if graphs else None)
        # Lets CUDA graphs overwrite what the network has returned up to now.
        self._replay = torch.compiler.cudagraph_mark_step_begin if graphs else lambda: None
        self.network, self.optimizer = accelerator.prepare(bare, adam)
        self._adam: Any = self.network.optimizer if self.deepspeed else self.optimizer
        if self.deepspeed and hasattr(self._adam, "check_grad_overflow"):
            self._adam.check_grad_overflow = True  # else ZeRO 1 and 2 do not check float32 gradients
        while hasattr(self._adam, "optimizer"):  # the innermost one
            self._adam = self._adam.optimizer
        # Whether DeepSpeed holds float32 weights and moments in partitions of its own.
        self._partitioned = any(hasattr(next(bare.parameters()), name) for name in ("ds_id", "_hp_mapping"))
        if self.stage and not self._partitioned:  # checkpoints would hold wrong moments
            refuse("deepspeed", "_hp_mapping or ds_id of a parameter")
        self._dtype = next(bare.parameters()).dtype
        self.sharded = self.stage == 3  # no rank has the whole network, so that every forward is collective
        name = f"DeepSpeed ZeRO-{self.stage}" if self.deepspeed else "DDP" if world > 1 else "one process"
        if shape and name == "DDP":
            self._settle_buckets(shape)
        self.described = f"{name}, {accelerator.mixed_precision.replace('no', 'float32')}"

    def _settle_buckets(self, shape: tuple[int, ...]) -> None:
        """Let DDP arrange its buckets before the first step, instead of after it.

        From three ranks on, the bits of a sum depend on places in buckets: a resumed run would not repeat them.
        """
        self.network.eval()  # running statistics stay as they are
        self.network(torch.zeros(1, *shape, device=self.accelerator.device)).float().sum().backward()
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) in float32, with gradient."""
        out: Tensor = self.network(x.to(self._dtype) if self.deepspeed else x)
        return out.float()

    def sample(self, x: Tensor) -> Tensor:
        """f(x) in float32, without gradient, in evaluation mode. Collective where the network is sharded."""
        # Under inference_mode ZeRO-3 would gather weights that autograd refuses afterwards.
        self.bare.eval()
        self._replay()
        with torch.no_grad() if self.deepspeed else torch.inference_mode():
            out: Tensor = self.bare(x.to(self._dtype) if self.deepspeed else x)
        self.bare.train()
        return out.float().clone() if self._graphs else out.float()

    def slope(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of the scalar loss(f(x)) by x, with the weights held. Not where the network is sharded."""
        x = x.detach().requires_grad_()
        out: Tensor = self.bare(x.to(self._dtype) if self.deepspeed else x)
        return torch.autograd.grad(loss(out.float()), x)[0]

    def encode(self, x: Tensor) -> Tensor:
        """The codes of x by the present network, without gradient, in float32. Not where the network is sharded."""
        network: Any = self.bare.eval()
        with torch.no_grad():
            out: Tensor = network.encode(x.to(self._dtype) if self.deepspeed else x)
        self.bare.train()
        return out.float()

    def exported(self, part: str, x: Tensor) -> Tensor:
        """f(x), or its `encode` or `decode`, by the network that is exported: the average, if one is kept.

        In float32, without gradient; codes are also computed in float32. Collective where the network is sharded.
        """
        network: Any = self.bare if self.ema is None else self.ema
        exact = self.deepspeed or part == "encode"
        network.eval()
        with torch.no_grad(), nullcontext() if exact else self.accelerator.autocast():
            out: Tensor = (getattr(network, part) if part else network)(x.to(next(network.parameters()).dtype))
        self.bare.train()
        return out.float()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; with a step's last they are averaged over ranks and micro-batches."""
        self._waiting = (self._waiting + 1) % self.accumulate
        if self.deepspeed:
            self.network.set_gradient_accumulation_boundary(is_boundary=self._waiting == 0)
            self.network.backward(loss)
        else:
            self.accelerator.backward(loss)

    def micro_batch(self) -> AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward: ranks communicate only in the last one of a step."""
        self._replay()
        return nullcontext() if self.deepspeed else self.accelerator.accumulate(self.network)

    def step(self) -> float | Tensor:
        """Collective: clip, step, zero the gradients. Returns the gradient's norm before clipping, equal on all ranks.

        If the norm is not finite, weights and moments stay as they are. With `ahead` the norm is a scalar on the
        device: to read it at once would have the device wait for the next step's launches.
        """
        self.copied.wait()
        if self.deepspeed:
            norm: float | Tensor = self._step_deepspeed()
        elif self.ahead:
            found: Tensor = self.accelerator.clip_grad_norm_(self.bare.parameters(), self._clip or math.inf)
            norm = found.detach()
            self._adam.grad_scale, self._adam.found_inf = None, (~norm.isfinite()).float()  # then it does not step
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)
        else:
            norm = float(self.accelerator.clip_grad_norm_(self.bare.parameters(), self._clip or math.inf))
            # Accelerate's wrapper searches the disk for a package at every step; only a scaler needs the wrapper.
            scaled = self.accelerator.scaler is not None
            if math.isfinite(norm) or scaled:  # a scaler skips the step itself, and adapts
                (self.optimizer if scaled else self._adam).step()
            self._adam.zero_grad(set_to_none=True)
        if self.accelerator.num_processes > 1:  # running statistics are rank 0's, so that all ranks sample alike
            for value in self.bare.buffers():
                dist.broadcast(value, src=0)
        if self.ema is not None and (self.ahead or math.isfinite(norm)):
            self._average(norm)
        return norm

    def _step_deepspeed(self) -> float:
        if self.stage == 0 and not hasattr(self.network.optimizer, "overflow"):  # it would step on NaN
            grads = [value.grad for value in self.bare.parameters() if value.grad is not None]
            norm = float(nn.utils.get_total_norm(grads))
            (self.network.step if math.isfinite(norm) else self.network.zero_grad)()
            return norm
        self.network.step()
        if getattr(self.network.optimizer, "overflow", False):
            return math.inf
        found = self.network.get_global_grad_norm()
        return float("nan") if found is None else float(found)

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

    def gathered(self) -> ExitStack:
        """Collective: within this context the bare network's parameters hold the whole weights, for reading."""
        stack, parameters = ExitStack(), self.bare.parameters()
        if self.sharded:
            from deepspeed.runtime.zero import GatheredParameters

            # One at a time on CPUs: when it gathers several, DeepSpeed 0.17 waits for the last one only.
            for some in parameters if self.accelerator.device.type == "cpu" else [list(parameters)]:
                stack.enter_context(GatheredParameters(some))
        return stack

    def states(self) -> Iterator[tuple[str, AdamState]]:
        """Collective: yield each parameter's whole state in turn, on every rank. Copy what is to be kept."""
        for name, parameter in self._names.items():
            if self._partitioned:
                from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

                found = {"weight": safe_get_full_fp32_param(parameter)}
                if self.steps:
                    found |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                yield name, found
            else:
                state = self._adam.state.get(parameter, {})
                yield name, {"weight": parameter.detach().float(), **{key: state[key] for key in MOMENTS if state}}

    @property
    def steps(self) -> int:
        """Number of steps that AdamW has made."""
        return max((int(state["step"]) for state in self._adam.state.values() if "step" in state), default=0)

    def restore(self, name: str, state: AdamState, steps: int) -> None:
        """Load one parameter's state; `steps` must be the same for all parameters."""
        parameter: Any = self._names[name]
        if not self._partitioned:
            with torch.no_grad():
                parameter.copy_(state["weight"])
            moments = {key: state[key].to(parameter.device, copy=True) for key in MOMENTS}
            where = parameter.device if self.ahead else "cpu"
            self._adam.state[parameter] = {"step": torch.tensor(float(steps), device=where), **moments}
            return
        from deepspeed import utils

        self._allocate(steps)
        for key, whole in state.items():
            value, part = whole.to(parameter.device), "full"
            if hasattr(parameter, "ds_id"):
                # safe_set_full_* fails where the world size does not divide the elements: pad and slice here.
                size, rank, part = parameter.ds_tensor.ds_numel, self.accelerator.process_index, "local"
                value = nn.functional.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
                value = value[rank * size : (rank + 1) * size]
            kind, keys = ("fp32_param", ()) if key == "weight" else ("optimizer_state", (key,))
            getattr(utils, f"safe_set_{part}_{kind}")(parameter, value, *keys)

    def _allocate(self, steps: int) -> None:
        """Allocate the moments that AdamW would allocate at its first step, unless they exist."""
        outer, adam = self.network.optimizer, self._adam
        if adam.state:
            return
        partitions = next((getattr(outer, name) for name in _FLAT if hasattr(outer, name)), None)
        if partitions is None:
            refuse("deepspeed", f"{' or '.join(_FLAT)} of {type(outer).__name__}")
        for flat in partitions:
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            adam.state[flat] = {"step": torch.tensor(float(steps)), **zeros}
        if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):
            outer._lazy_init_hp_params_optimizer_state()

    @property
    def scale(self) -> dict[str, float]:
        """The state of fp16's loss scaler; {} where there is none."""
        if self.deepspeed:
            scaler = getattr(self.network.optimizer, "loss_scaler", None)
            return {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)}
        return dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler is not None else {}

    @scale.setter
    def scale(self, state: dict[str, float]) -> None:
        if self.deepspeed:
            for name, value in self.scale.items():
                setattr(self.network.optimizer.loss_scaler, name, type(value)(state.get(name, value)))
        elif self.accelerator.scaler is not None and "scale" in state:
            self.accelerator.scaler.load_state_dict(state)


# Where DeepSpeed's optimizers keep the float32 weights of this rank: ZeRO-3, ZeRO-1 and 2, bfloat16 without ZeRO.
_FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def compile_communication() -> None:
    """Compile DeepSpeed's communication for CPUs, one process of the machine at a time.

    torch's own lock is a file that a killed process leaves behind, where it blocks all later starts.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{builder.name}.lock"):
        for left in (*root.glob(f"{builder.name}/lock"), *root.glob(f"*/{builder.name}/lock")):
            left.unlink(missing_ok=True)
        builder.load()


def _configure(accelerator: Accelerator, *, micro: int, accumulate: int, clip: float) -> None:
    """Write the run's settings into DeepSpeed's configuration; InputError where that says otherwise."""
    from torch.utils.cpp_extension import CUDA_HOME  # loads setuptools

    config = accelerator.state.deepspeed_plugin.deepspeed_config
    wanted = {
        "train_micro_batch_size_per_gpu": (micro, "train.batch"),
        "gradient_accumulation_steps": (accumulate, "train.accumulate"),
        "gradient_clipping": (clip, "train.clip"),
        "train_batch_size": (micro * accumulate * accelerator.num_processes, "train.batch"),
    }
    for key, (value, setting) in wanted.items():
        configured = config.get(key, "auto")
        if configured not in ("auto", None, value) and (key, configured) != ("gradient_accumulation_steps", 1):
            said = f"the launcher's DeepSpeed configuration says {key}: {configured}, but {setting} makes it {value}"
            raise InputError(f"{said}: remove it there, or change the run's setting")
        config[key] = value
    accelerator.gradient_accumulation_steps, config["steps_per_print"] = accumulate, math.inf
    # DeepSpeed's AdamW for offloaded weights is compiled first, with CUDA's headers; torch's does the same, slower.
    if not torch.cuda.is_available() or shutil.which("g++") is None or CUDA_HOME is None:
        config["zero_force_ds_cpu_optimizer"] = False
