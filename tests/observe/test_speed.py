"""Peak memory, and traces of the wanted rounds and no others."""

import gzip
import json
import os

import pytest
import torch

from naign.observe.speed import parse_rounds, peak_memory, profiled
from tests.refused import refused


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
