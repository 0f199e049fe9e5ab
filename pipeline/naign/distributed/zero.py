"""The engine under DeepSpeed, ZeRO 1 to 3. The only file that imports DeepSpeed."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from filelock import FileLock
from torch import Tensor, nn

from naign.distributed.engine import Engine, State
from naign.distributed.muon import MOMENTS, Muon, orthogonal
from naign.errors import InputError


class Piece(NamedTuple):
    """The part of a matrix that lies in a rank's flat weights."""

    shape: tuple[int, ...]  # of the whole matrix
    start: int  # in the flat weights
    place: int  # in the flattened matrix
    length: int  # 0: this rank has no part of it


class ZeroEngine(Engine):
    """Engine that DeepSpeed runs, with AdamW or Muon."""

    gathers = True
    _ungraded = torch.no_grad  # under inference_mode ZeRO-3 would gather weights that autograd refuses afterwards

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises InputError where the launcher's configuration contradicts the run's settings."""
        _configure(self.accelerator, micro=self.micro, accumulate=self.accumulate, clip=self._clip)
        stage = int(self.accelerator.state.deepspeed_plugin.zero_stage)
        self.sharded = stage == 3
        self._waiting = 0  # micro-batches of the present step that were added up
        if isinstance(optimizer, Muon):
            self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        super()._prepare(optimizer)
        self._kind = f"DeepSpeed ZeRO-{stage}"
        if hasattr(self.network.optimizer, "check_grad_overflow"):
            self.network.optimizer.check_grad_overflow = True  # else ZeRO 1 and 2 do not check float32 gradients
        # By these DeepSpeed finds float32 weights and moments in partitions of its own.
        parameter = next(self.bare.parameters())
        if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
            _refuse_version("_hp_mapping or ds_id of a parameter")
        self._pieces: dict[Tensor, list[Piece]] = {}  # by flat weights
        if isinstance(optimizer, Muon):
            self._pieces = self._find_pieces()
            optimizer.turn = self._turn
            self._allocate()  # else DeepSpeed finds the moments of the first group alone

    def _find_pieces(self) -> dict[Tensor, list[Piece]]:
        found = {}
        flats, groups = self._partitions()
        for flat, parameters in zip(flats, groups, strict=True):
            pieces = []
            end = 0
            for parameter in parameters:
                if hasattr(parameter, "ds_id"):
                    size = parameter.ds_tensor.ds_numel
                    place = size * self.accelerator.process_index
                    length = max(0, min(size, parameter.ds_numel - place))
                    pieces.append(Piece(parameter.ds_shape, end, place, length))
                    end += size
                elif parameter._hp_mapping is None:
                    pieces.append(Piece(parameter.shape, 0, 0, 0))
                else:
                    here = parameter._hp_mapping.hp_fragment_address
                    place = parameter._hp_mapping.lp_fragment_address.start
                    pieces.append(Piece(parameter.shape, here.start, place, here.numel))
            if len(pieces[0].shape) > 1:
                found[flat] = pieces
        return found

    def _turn(self, flats: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        """As `naign.distributed.muon.turn_here`, for flat weights: each matrix is gathered whole on every rank."""
        changes = []
        for flat, direction in zip(flats, directions, strict=True):
            change = torch.zeros_like(direction)
            for shape, start, place, length in self._pieces[flat]:
                mine = slice(start, start + length)
                gathered = torch.zeros(math.prod(shape), device=self.accelerator.device)
                gathered[place : place + length] = direction[mine]
                gathered = reduce(gathered)
                turned = orthogonal(gathered.view(shape)).flatten()
                change[mine] = turned[place : place + length]
            changes.append(change)
        return changes

    def backward(self, loss: Tensor) -> None:
        self._waiting = (self._waiting + 1) % self.accumulate
        self.network.set_gradient_accumulation_boundary(is_boundary=self._waiting == 0)
        self.network.backward(loss)

    def micro_batch(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _step(self) -> float:
        self.network.step()
        if getattr(self.network.optimizer, "overflow", False):
            return math.inf
        clipped = self.network.get_global_grad_norm()
        if clipped is None:
            return math.nan
        return float(clipped)

    def gathered(self) -> ExitStack:
        stack = ExitStack()
        if not self.sharded:
            return stack
        from deepspeed.runtime.zero import GatheredParameters

        parameters: list[Any] = list(self.bare.parameters())
        if self.accelerator.device.type != "cpu":
            parameters = [parameters]
        for some in parameters:  # one at a time on CPUs: of several, DeepSpeed 0.17 waits for the last one only
            stack.enter_context(GatheredParameters(some))
        return stack

    def states(self) -> Iterator[tuple[str, State]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._names.items():
            state = {"weight": safe_get_full_fp32_param(parameter)}
            if self.steps:
                state |= {key: safe_get_full_optimizer_state(parameter, key) for key in self._moments(name)}
            yield name, state

    def state_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("weight", *self._moments(name)), self.shapes[name])

    def _moments(self, name: str) -> tuple[str, ...]:
        is_turned = bool(self._pieces) and len(self.shapes[name]) > 1
        return MOMENTS[:1] if is_turned else MOMENTS

    def restore(self, name: str, state: State, steps: int) -> None:
        from deepspeed import utils

        parameter: Any = self._names[name]
        self._allocate()
        for kept in self._adam.state.values():
            kept["step"] = torch.tensor(float(steps))
        for key, whole in state.items():
            value = whole.to(parameter.device)
            part = "full"
            if hasattr(parameter, "ds_id"):
                # safe_set_full_* fails where the world size does not divide the elements: pad and slice here.
                part = "local"
                size = parameter.ds_tensor.ds_numel
                first = self.accelerator.process_index * size
                missing = size * self.accelerator.num_processes - value.numel()
                padded = nn.functional.pad(value.flatten(), (0, missing))
                value = padded[first : first + size]
            if key == "weight":
                getattr(utils, f"safe_set_{part}_fp32_param")(parameter, value)
            else:
                getattr(utils, f"safe_set_{part}_optimizer_state")(parameter, value, key)

    def _allocate(self) -> None:
        """Allocate the moments that the first step would allocate, unless they exist."""
        outer = self.network.optimizer
        adam = self._adam
        if adam.state:
            return
        flats, _ = self._partitions()
        for flat in flats:
            moments = MOMENTS[:1] if flat in self._pieces else MOMENTS
            zeros = {key: torch.zeros_like(flat) for key in moments}
            adam.state[flat] = {"step": torch.tensor(0.0), **zeros}
        if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):
            outer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> tuple[list[Tensor], list[list[Any]]]:
        """This rank's flat float32 weights, and the parameters of which each holds the parts, in turn."""
        outer = self.network.optimizer
        for flats, groups in _FLAT.items():
            if getattr(outer, flats, None):
                return getattr(outer, flats), getattr(outer, groups)
        _refuse_version(f"{' or '.join(_FLAT)} of {type(outer).__name__}")


# Where DeepSpeed's optimizers keep the float32 weights of this rank: ZeRO-3, ZeRO-1 and 2, bfloat16 by itself.
_FLAT = {
    "fp32_partitioned_groups_flat": "fp16_groups",
    "single_partition_of_fp32_groups": "bit16_groups",
    "fp32_groups_flat_partition": "bf16_groups",
}


def _refuse_version(missing: str) -> NoReturn:
    raise InputError(f"this version of DeepSpeed has no {missing}: pip install 'deepspeed>=0.17,<0.20'")


def _configure(accelerator: Accelerator, *, micro: int, accumulate: int, clip: float) -> None:
    """Write the run's settings into DeepSpeed's configuration; InputError where that says otherwise."""
    from torch.utils.cpp_extension import CUDA_HOME  # loads setuptools

    config = accelerator.state.deepspeed_plugin.deepspeed_config
    needed = {
        "train_micro_batch_size_per_gpu": (micro, "train.batch"),
        "gradient_accumulation_steps": (accumulate, "train.accumulate"),
        "gradient_clipping": (clip, "train.clip"),
        "train_batch_size": (micro * accumulate * accelerator.num_processes, "train.batch"),
    }
    for key, (value, setting) in needed.items():
        configured = config.get(key, "auto")
        if configured not in ("auto", None, value) and (key, configured) != ("gradient_accumulation_steps", 1):
            conflict = f"the launcher's DeepSpeed settings say {key}: {configured}, but {setting} makes it {value}"
            raise InputError(f"{conflict}: remove it there, or change the run's setting")
        config[key] = value
    accelerator.gradient_accumulation_steps = accumulate
    config["steps_per_print"] = math.inf
    # DeepSpeed's AdamW for offloaded weights is compiled first, with CUDA's headers; torch's does the same, slower.
    if not torch.cuda.is_available() or shutil.which("g++") is None or CUDA_HOME is None:
        config["zero_force_ds_cpu_optimizer"] = False


def compile_communication() -> None:
    """Compile DeepSpeed's communication for CPUs, one process at a time: torch's lock file outlives a kill."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME):
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{builder.name}.lock"):
        for left in root.rglob(f"{builder.name}/lock"):
            left.unlink(missing_ok=True)
        builder.load()
