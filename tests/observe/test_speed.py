"""Peak memory, and traces of the wanted rounds and no others."""

import gzip
import json
import os

import pytest
import torch

from naign.observe.speed import Profiler, parse_rounds, peak_memory
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


def run(profiler, rounds):
    for number in rounds:
        with profiler.round(number):
            for name in ("take", "match", "fit"):
                with profiler.phase(name):
                    torch.ones(8, 8) @ torch.ones(8, 8)


def names_in(file):
    """The names of what a trace holds."""
    trace = json.loads(gzip.decompress(file.read_bytes()))
    return {event["name"] for event in trace["traceEvents"]}


def test_a_trace_of_each_wanted_round(tmp_path):
    run(Profiler(tmp_path, "2-3", rank=5), range(5))
    files = sorted((tmp_path / "profile").iterdir())
    assert sorted(os.listdir(tmp_path / "profile")) == ["rank-00005-round-2.json.gz", "rank-00005-round-3.json.gz"]
    second = names_in(files[0])
    assert {"round 2", "take", "match", "fit", "aten::mm", "[memory]"} <= second
    assert not {"round 1", "round 3"} & second
    assert "round 3" in names_in(files[1])


def test_without_rounds_nothing_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.profiler.profile", None)
    for rounds in ("", "7"):
        run(Profiler(tmp_path, rounds, 0), range(3))
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_raises_is_written(tmp_path):
    profiler = Profiler(tmp_path, "1-2", 0)
    with pytest.raises(FloatingPointError), profiler.round(1), profiler.phase("fit"):
        raise FloatingPointError
    (file,) = (tmp_path / "profile").iterdir()
    assert {"round 1", "fit"} <= names_in(file)


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    run(Profiler(tmp_path, "0", 3), range(2))
    assert "no trace of rank 3" in caplog.text
