"""A device that only exists for fake tensors, with the autocast of CUDA: to see what a GPU would be asked for.

torch registers one such device a process, and for good: use it in a process of its own.
"""

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "card"

LOW = """conv2d.default convolution.default conv_transpose2d.input linear.default matmul.default mm.default bmm.default
addmm.default baddbmm.default scaled_dot_product_attention.default"""
"""What CUDA's autocast computes in bfloat16 (pytorch.org/docs/stable/amp.html), of what the networks here call."""

HIGH = (
    "group_norm.default layer_norm.default softmax.int log_softmax.int norm.ScalarOpt_dim pow.Tensor_Scalar sum.default"
)
"""What it computes in float32."""

_libraries = []


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def device():
    """The device; `torch.autocast(NAME, dtype=torch.bfloat16)` is its autocast."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    ours = torch.library.Library("aten", "IMPL")
    for names, dtype in ((LOW, torch.bfloat16), (HIGH, torch.float32)):
        for name in names.split():
            packet, overload = name.split(".")
            op = getattr(getattr(torch.ops.aten, packet), overload)
            ours.impl(op, _cast(op, dtype), "AutocastPrivateUse1")
    _libraries.extend((rest, ours))
    return torch.device(NAME, 0)


def _cast(op, dtype):
    def convert(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == NAME
        return value.to(dtype) if floating else value

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*tree_map(convert, args), **tree_map(convert, kwargs))

    return run
