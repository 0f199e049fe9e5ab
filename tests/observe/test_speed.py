"""Counted operations, known peaks, and traces of the wanted rounds and no others."""

import gzip
import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from naign.errors import InputError
from naign.model.networks import NETWORKS, ConvConfig, build_network
from naign.observe.speed import Profiler, fit_flops, forward_flops, parse_rounds, peak_flops, peak_memory

CUDA = torch.device("cuda", 0)


def test_operations_are_those_one_counts_by_hand():
    linear = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 3))
    assert forward_flops(linear, (10,)) == 2 * (10 * 20 + 20 * 3)
    assert forward_flops(linear, (10,), batch=7) == 7 * forward_flops(linear, (10,))
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)  # to (8, 16, 16)
    assert forward_flops(conv, (3, 32, 32), batch=2) == 2 * 2 * (8 * 16 * 16) * (3 * 5 * 5)
    assert fit_flops(100, 2) == 600


def test_a_backward_is_about_twice_a_forward():
    from torch.utils.flop_counter import FlopCounterMode

    network = build_network(ConvConfig(width=8), (3, 16, 16))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, 3, 16, 16)).square().mean().backward()
    # The first layer needs no gradient of its input.
    wanted = fit_flops(forward_flops(network, (3, 16, 16)), 2)
    assert 0.9 * wanted < counter.get_total_flops() <= wanted


@pytest.mark.parametrize("network, shape", [("mlp", (2,)), ("conv", (1, 28, 28))])
def test_counting_leaves_the_network_alone(network, shape):
    bare = build_network(NETWORKS[network][0](width=8, depth=1), shape)
    bare.register_buffer("noise", torch.randn(3))
    calls = []
    bare.compile(backend=lambda graph, inputs: calls.append(graph) or graph)
    before = {name: (id(value), value.clone()) for name, value in bare.state_dict(keep_vars=True).items()}
    assert forward_flops(bare, shape) > 0 and not calls
    after = bare.state_dict(keep_vars=True)
    assert all(id(after[name]) == place and torch.equal(after[name], value) for name, (place, value) in before.items())
    assert all(value.requires_grad and value.grad is None for value in bare.parameters())


def test_a_large_network_is_counted_without_memory():
    with torch.device("meta"):
        large = nn.Linear(2**24, 2**20)  # 70 TB, if it were copied to a device
    assert forward_flops(large, (2**24,), batch=2**16) == 2**16 * 2 * 2**44


def test_counting_copies_no_parameter(monkeypatch):
    """Nor does it run a kernel on one: the copy that is counted lies on the meta device."""
    devices = set()

    class Layer(nn.Linear):
        def forward(self, x):
            devices.update((x.device.type, self.weight.device.type, self.bias.device.type))
            return super().forward(x)

    layer = Layer(4, 4)
    monkeypatch.setattr(torch.Tensor, "clone", None)  # what a deep copy of a tensor with data needs
    assert forward_flops(layer, (4,)) == 32 and devices == {"meta"}
    assert layer.weight.device.type == "cpu"


@pytest.mark.parametrize(
    "name, half, plain",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("Tesla T4", None, 8.1e12),
        # Not these: parts of a GPU, and GPUs whose names are longer or shorter.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
        ("GRID A100-10C", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA H20", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peaks_by_name(monkeypatch, name, half, plain):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
    assert peak_flops(CUDA, torch.bfloat16) == half
    assert peak_flops(CUDA, torch.float32) == plain
    assert peak_flops(CUDA, torch.float64) is None


def test_float32_counts_as_tf32_where_convolutions_use_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(CUDA, torch.float32) == 494e12  # torch's default
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert peak_flops(CUDA, torch.float32) == 67e12
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_processor_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_memory_of_a_processor_is_the_peak_of_the_process(monkeypatch, platform, unit):
    """In units of the system: kilobytes, on macOS bytes (getrusage(2))."""
    monkeypatch.setattr("naign.observe.speed.sys.platform", platform)
    usage = {resource.RUSAGE_SELF: SimpleNamespace(ru_maxrss=3_000_000_000 // unit)}
    monkeypatch.setattr("naign.observe.speed.resource.getrusage", usage.__getitem__)
    assert peak_memory(torch.device("cpu")) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_a_gpu():
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory(CUDA)
    held = torch.ones(2**27, device=CUDA)
    assert peak_memory(CUDA) == pytest.approx(before + held.nbytes / 1e9)


def test_rounds_as_one_writes_them():
    assert parse_rounds("") == range(0)
    assert list(parse_rounds("3")) == [3] and list(parse_rounds("0")) == [0]
    assert list(parse_rounds("3-5")) == [3, 4, 5] and list(parse_rounds("3-3")) == [3]


@pytest.mark.parametrize("text", ["4-3", "a", "-1", "3-", "3-4-5", "3,4", " 3", "1.5", "٣", "9" * 5000, "3\n"])
def test_rounds_that_are_none(text):
    with pytest.raises(InputError, match=r"(?s)profile\.rounds is '.*': give one round, as 3"):
        parse_rounds(text)
    with pytest.raises(InputError):
        Profiler(Path("run"), text, 0)


def run(profiler: Profiler, rounds: range) -> None:
    for number in rounds:
        with profiler.round(number):
            for name in ("take", "match", "fit"):
                with profiler.phase(name):
                    torch.ones(8, 8) @ torch.ones(8, 8)


def events(file: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def traces(folder: Path) -> list[set[str]]:
    """The names of what each trace holds."""
    return [{event["name"] for event in events(file)} for file in sorted(folder.glob("profile/*.json.gz"))]


def test_a_trace_of_each_wanted_round(tmp_path):
    profiler = Profiler(tmp_path, "2-3", rank=5)
    run(profiler, range(3))
    (second,) = traces(tmp_path)  # written after the round, not at the end
    run(profiler, range(3, 6))
    before, third = traces(tmp_path)
    assert before == second and {"round 2", "take", "match", "fit", "aten::mm"} <= second
    assert "round 3" in third and not {"round 1", "round 3", "round 4"} & second
    files = sorted((tmp_path / "profile").iterdir())
    assert [file.name for file in files] == ["rank-00005-round-2.json.gz", "rank-00005-round-3.json.gz"]
    assert any("Input Dims" in event.get("args", {}) for event in events(files[0]))
    assert "[memory]" in second


def test_without_rounds_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.profiler.profile", None)
    monkeypatch.setattr("torch.profiler.record_function", None)
    for rounds in ("", "7"):
        run(Profiler(tmp_path, rounds, 0), range(3))
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_raises_is_written(tmp_path):
    profiler = Profiler(tmp_path, "1-2", 0)
    with pytest.raises(FloatingPointError), profiler.round(1), profiler.phase("fit"):
        raise FloatingPointError
    (names,) = traces(tmp_path)
    assert {"round 1", "fit"} <= names


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    run(Profiler(tmp_path, "0", 3), range(2))
    assert "no trace of rank 3" in caplog.text
