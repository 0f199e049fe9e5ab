"""A network f as an ONNX program, which needs no code of this project. Batches have any size."""

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

from naign.errors import InputError, one_line, require
from naign.storage.local import write_atomically

TOLERANCE = 1e-5  # of an ONNX program, absolute and relative


def write_onnx(network: nn.Module, shape: tuple[int, ...], file: Path) -> float | None:
    """Write f as ONNX: `x`, (n, *shape) float32, to `projected`, the same. The network is on the CPU.

    Returns the largest difference from f in onnxruntime; None where that is not installed. Raises InputError, and
    writes nothing, where packages are missing, the network cannot be exported or the difference is above TOLERANCE.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    require((not missing, f"--format onnx needs {' and '.join(missing)}: in a checkout, pip install -e '.[onnx]'"))
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch itself does
            x, batch = torch.zeros(2, *shape), {0: torch.export.Dim("batch", min=1)}
            program = torch.onnx.export(
                network, (x,), dynamic_shapes=(batch,), input_names=["x"], output_names=["projected"], verbose=False
            )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # stack traces with paths of this machine
        content = program.model_proto.SerializeToString()
    except Exception as error:  # the exporter's, or protobuf's, which holds at most 2 GiB
        raise InputError(f"torch cannot export this network to ONNX: {one_line(error)}") from None
    largest = None
    if importlib.util.find_spec("onnxruntime"):
        x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            (actual,), expected = program(x), network(x)
        largest = float((actual - expected).abs().max())
        close = torch.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
        require((close, f"in onnxruntime the program differs from f by {largest:.2g}, which is too much: not written"))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    return largest
