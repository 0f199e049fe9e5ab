"""What is reported goes to every tracker, and one of another package harms nobody."""

import json
from importlib.metadata import EntryPoint

import pytest
import torch
from PIL import Image

from pipeline import registry
from pipeline.errors import InputError
from pipeline.observe.doctor import preflight
from pipeline.observe.monitor import Monitor

calls = []


class Recorder:
    """A tracker of another package. `fail` names the method that raises."""

    fail = ""

    def __init__(self, settings, folder, images_seen):
        self.record("build", settings, folder.name, images_seen)

    def record(self, name, *values):
        calls.append((name, *values))
        if name == self.fail:
            raise ConnectionError("no network")

    def __getattr__(self, name):
        return lambda *values: self.record(name, *values)


RECORDER = (dict, Recorder)


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    points = {
        "recorder": EntryPoint("recorder", f"{__name__}:RECORDER", "naign.trackers"),
        "broken": EntryPoint("broken", "no_such_module:X", "naign.trackers"),
    }
    monkeypatch.setattr(registry, "_entry_points", lambda group: points if group == "naign.trackers" else {})
    monkeypatch.setattr(Recorder, "fail", "")
    calls.clear()


def report(folder, trackers, images_seen=0, active=True):
    monitor = Monitor(folder, active=active, images=100, images_seen=images_seen, config="seed: 0", trackers=trackers)
    with monitor:
        monitor.advance(10)
        monitor.scalars({"loss/total": 0.5}, images_seen + 10, round=1, step=2)
        monitor.histogram("match/distance", torch.ones(3), images_seen + 10)
        monitor.picture("samples", Image.new("RGB", (4, 4)), images_seen + 10)
        monitor.flush()
    return monitor


def test_every_tracker_is_told_everything(tmp_path):
    report(tmp_path, "tensorboard, recorder")
    assert [call[0] for call in calls] == ["build", "text", "scalars", "histogram", "picture", "flush", "close"]
    assert calls[0] == ("build", {}, tmp_path.name, 0)
    assert calls[1] == ("text", "config", "```yaml\nseed: 0\n```", 0)
    assert calls[2] == ("scalars", {"loss/total": 0.5}, 10, {"round": 1, "step": 2})
    (entry,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert entry.pop("time") and entry == {"images_seen": 10, "round": 1, "step": 2, "loss/total": 0.5}
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "samples/samples-0000000010.png").exists()


@pytest.mark.parametrize("trackers", ["", "jsonl", "recorder"])
def test_tensorboard_can_be_left_out_and_metrics_cannot(tmp_path, trackers):
    report(tmp_path, trackers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples"]
    assert bool(calls) == (trackers == "recorder")


def test_a_rank_that_is_not_the_first_reports_nothing(tmp_path):
    report(tmp_path, "tensorboard,recorder", active=False)
    assert not calls and not list(tmp_path.iterdir())


def test_a_resumed_run_drops_what_was_reported_later(tmp_path):
    lines = [json.dumps({"images_seen": seen}) for seen in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"images_seen": 4']))
    report(tmp_path, "", images_seen=20)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["images_seen"], "loss/total" in entry) for entry in entries] == [
        (10, False),
        (20, False),
        (30, True),
    ]


@pytest.mark.parametrize("method", ["build", "text", "scalars", "flush", "close"])
def test_a_tracker_of_another_package_that_fails_is_left_out(tmp_path, caplog, monkeypatch, method):
    monkeypatch.setattr(Recorder, "fail", method)
    report(tmp_path, "recorder")
    assert calls[-1][0] == method and caplog.text.count("tracker recorder failed") == 1
    assert "no network" in caplog.text and (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_disk_that_fails_is_the_user_s_to_mend(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="what is reported cannot be written .*make room"):
        report(tmp_path, "")


@pytest.mark.parametrize(("name", "known"), [("tensorbord", "jsonl, tensorboard, "), ("broken", "no_such_module")])
def test_a_tracker_that_is_not_there_is_refused_in_the_first_second(tmp_path, name, known):
    with pytest.raises(InputError, match=f"report.trackers is '{name}'.*{known}"):
        preflight(run=str(tmp_path), remote="", checkpoint_bytes=1, say=lambda line: None, trackers=name)
