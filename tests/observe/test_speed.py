"""Counted operations, peak memory, and traces of the wanted rounds and no others."""

import gzip
import json
import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from naign.model.networks import ConvConfig, build_network
from naign.observe.speed import fit_flops, forward_flops, parse_rounds, peak_memory, profiled
from tests.refused import refused


def test_operations_are_those_one_counts_by_hand():
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)  # to (8, 16, 16)
    linear = nn.Linear(8 * 16 * 16, 10)
    network = nn.Sequential(conv, nn.SiLU(), nn.Flatten(), linear)
    multiplications = 8 * 16 * 16 * (3 * 5 * 5 + 10)
    assert forward_flops(network, (3, 32, 32)) == 2 * multiplications


def test_a_backward_is_about_twice_a_forward():
    network = build_network(ConvConfig(width=8), (3, 16, 16))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, 3, 16, 16)).square().mean().backward()
    # The first layer needs no gradient of its input.
    wanted = fit_flops(forward_flops(network, (3, 16, 16)), 2)
    assert 0.9 * wanted < counter.get_total_flops() <= wanted


def test_counting_leaves_the_network_alone():
    bare = build_network(ConvConfig(width=8, depth=1), (1, 28, 28))
    bare.register_buffer("noise", torch.randn(3))
    calls = []
    bare.compile(backend=lambda graph, inputs: calls.append(graph) or graph)
    before = bare.state_dict(keep_vars=True)
    values = {name: value.clone() for name, value in before.items()}
    assert forward_flops(bare, (1, 28, 28)) > 0
    assert not calls
    for name, value in bare.state_dict(keep_vars=True).items():
        assert value is before[name]
        assert torch.equal(value, values[name])
    for value in bare.parameters():
        assert value.requires_grad
        assert value.grad is None


def test_a_large_network_is_counted_without_memory():
    with torch.device("meta"):
        large = nn.Linear(2**24, 2**20)  # 70 TB, if it were copied to a device
    assert forward_flops(large, (2**24,)) == 2 * 2**44


def test_memory_of_a_processor_is_the_peak_of_the_process():
    torch.ones(2**27)
    assert 0.5 < peak_memory(torch.device("cpu")) < 100  # in GB, whatever the unit of the system


def test_rounds_as_one_writes_them():
    assert parse_rounds("") == range(0)
    assert list(parse_rounds("0")) == [0]
    assert list(parse_rounds("3-5")) == [3, 4, 5]
    assert list(parse_rounds("3-3")) == [3]


@pytest.mark.parametrize("text", ["4-3", "-1", "3-4-5", "3,4", "٣", "9" * 5000])
def test_rounds_that_are_not_understood(text):
    with refused(r"(?s)profile\.rounds is '.*': give one round, as 3"):
        parse_rounds(text)


def test_a_trace_of_a_round(tmp_path):
    with profiled(tmp_path, 5, 2), torch.profiler.record_function("fit"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert os.listdir(tmp_path / "profile") == ["rank-00005-round-2.json.gz"]
    trace = json.loads(gzip.decompress((tmp_path / "profile/rank-00005-round-2.json.gz").read_bytes()))
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"fit", "aten::mm", "[memory]"} <= names


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    with profiled(tmp_path, 3, 0):
        pass
    assert "no trace of rank 3" in caplog.text
