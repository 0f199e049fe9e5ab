"""A network f as a program that needs no code of this project: one of torch.export, or ONNX. Batches have any size."""

import importlib.util
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from pipeline.errors import InputError, one_line, require
from pipeline.storage.local import write_atomically

TOLERANCE = 1e-5  # of an ONNX program, absolute and relative
MOST_BYTES = 2**31 - 2**20  # of a protobuf message, with room for the graph


def write_torch(network: nn.Module, shape: tuple[int, ...], file: Path) -> None:
    """Write f for torch.export.load: (n, *shape) float32 to the same."""
    program = torch.export.export(network, (torch.zeros(2, *shape),), dynamic_shapes=(_batch(),))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it has paths of this machine
    content = io.BytesIO()
    torch.export.save(program, content)
    _write(file, content.getvalue())


def write_onnx(network: nn.Module, shape: tuple[int, ...], file: Path) -> float | None:
    """Write f as ONNX: `x`, (n, *shape) float32, to `projected`, the same. The network is on the CPU.

    Returns the largest difference from f in onnxruntime; None where that is not installed. Raises InputError, and
    writes nothing, where packages are missing, the network cannot be exported or the difference is above TOLERANCE.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    require(
        (not missing, f"--format onnx needs {' and '.join(missing)}: in a checkout, pip install -e '.[onnx]'"),
        (size < MOST_BYTES, "an ONNX file holds at most 2 GiB, this network is larger: choose --format torch"),
    )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch itself does
            program = torch.onnx.export(
                network,
                (torch.zeros(2, *shape),),
                dynamo=True,
                verbose=False,
                dynamic_shapes=(_batch(),),
                input_names=["x"],
                output_names=["projected"],
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"torch cannot export this network to ONNX: {one_line(error)}") from None
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # stack traces with paths of this machine
    content = program.model_proto.SerializeToString()
    largest = difference(content, network, shape) if importlib.util.find_spec("onnxruntime") else None
    _write(file, content)
    return largest


def difference(content: bytes, network: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest difference between f and its ONNX program on 3 rows; InputError if it is above TOLERANCE."""
    import onnxruntime

    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    actual = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    with torch.inference_mode():
        expected: Tensor = network(x)
    largest = float((actual - expected).abs().max())
    if not torch.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise InputError(f"in onnxruntime the program differs from f by {largest:.2g}, which is too much: not written")
    return largest


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)


def _batch() -> dict[int, object]:
    return {0: torch.export.Dim("batch", min=1)}
