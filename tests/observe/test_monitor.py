"""What is reported goes to every tracker, and one of another package that fails harms nobody."""

import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from importlib.metadata import EntryPoint
from unittest.mock import Mock

import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from naign.errors import Unavailable
from naign.observe import monitor
from naign.observe.monitor import Monitor
from naign.observe.trackers import JsonLines, find_trackers
from naign.settings import registry
from tests.conftest import ROOT
from tests.refused import refused
from tests.servers import free_port

DASHBOARD = ROOT / "k8s/components/monitor/dashboard.json"

calls = []


class Recorder(GeneralTracker):
    """A tracker of another package. `fail` names the method that raises."""

    name = "recorder"
    requires_logging_directory = True
    tracker = None
    fail = ""

    def __init__(self, project, folder):
        super().__init__()
        self.record("build", project, folder)

    def record(self, name, *values):
        calls.append((name, *values))
        if name == self.fail:
            raise ConnectionError("no network")

    def store_init_configuration(self, values):
        self.record("configuration", values)

    def log(self, values, step=None, **kwargs):
        self.record("log", values, step)

    def log_images(self, values, step=None):
        self.record("log_images", list(values), step)

    def finish(self):
        self.record("finish")


@pytest.fixture(autouse=True)
def points(monkeypatch):
    entry_points = {
        "recorder": EntryPoint("recorder", f"{__name__}:Recorder", "naign.trackers"),
        "broken": EntryPoint("broken", "no_such_module:X", "naign.trackers"),
    }
    monkeypatch.setattr(registry, "_entry_points", lambda group: entry_points)
    calls.clear()


def opened(folder, trackers, seen=0, active=True):
    settings = {"seed": 0, "train.lr": 2e-3}
    return Monitor(
        folder,
        active=active,
        images=100,
        seen=seen,
        settings=settings,
        trackers=trackers,
    )


def report(folder, trackers, seen=0, active=True):
    with opened(folder, trackers, seen, active) as monitor:
        monitor.advance(10)
        monitor.scalars({"loss/total": 0.5}, seen + 10, round=1, step=2)
        monitor.picture("samples", Image.new("RGB", (4, 4)), seen + 10)
        monitor.flush()


def entries(folder):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_every_tracker_is_told_everything(tmp_path):
    report(tmp_path, "tensorboard, recorder")
    assert calls == [
        ("build", "naign", str(tmp_path)),
        ("configuration", {"seed": 0, "train.lr": 2e-3}),
        ("log", {"round": 1, "step": 2, "loss/total": 0.5}, 10),
        ("log_images", ["samples"], 10),
        ("finish",),
    ]
    (entry,) = entries(tmp_path)
    assert entry.pop("time") > 0
    assert entry == {"images_seen": 10, "round": 1, "step": 2, "loss/total": 0.5}
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "samples/samples-0000000010.png").exists()


@pytest.mark.parametrize("trackers", ["", "['recorder', jsonl]"])
def test_tensorboard_can_be_left_out_and_metrics_cannot(tmp_path, trackers):
    report(tmp_path, trackers)
    assert set(os.listdir(tmp_path)) == {"metrics.jsonl", "samples"}
    assert bool(calls) == ("recorder" in trackers)


def test_every_line_of_the_metrics_is_valid_json(tmp_path):
    values = {"quality/fd": math.inf, "loss/total": math.nan, "loss/imle": 0.5}
    with opened(tmp_path, "recorder") as monitor:
        monitor.scalars(values, 10, round=1)
    (entry,) = entries(tmp_path)
    assert entry.keys() == {"images_seen", "round", "loss/imle", "time"}
    assert calls[2][1]["quality/fd"] == math.inf  # others show that it is not finite


def test_a_rank_that_is_not_the_first_reports_nothing(tmp_path):
    report(tmp_path, "tensorboard,recorder", active=False)
    assert not calls
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_drops_what_was_reported_later(tmp_path):
    lines = [
        {"images_seen": 10},
        {"images_seen": 15, "codes_seen": 5},
        {"images_seen": 15, "codes_seen": 15},
    ]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"images_seen": 4')
    report(tmp_path, "", seen=20)
    kept = entries(tmp_path)
    assert kept[:2] == lines[:2]
    assert [entry["images_seen"] for entry in kept] == [10, 15, 30]


def test_tensorboard_drops_what_a_resumed_run_reports_again(tmp_path):
    report(tmp_path, "tensorboard")
    report(tmp_path, "tensorboard", seen=5)  # resumes before what was reported
    board = EventAccumulator(f"{tmp_path}/tensorboard").Reload()
    assert [event.step for event in board.Scalars("loss/total")] == [15]
    assert [event.step for event in board.Images("samples")] == [15]
    assert "config/text_summary" in board.Tags()["tensors"]


@pytest.mark.parametrize("method", ["build", "log", "finish"])
def test_a_tracker_that_fails_is_left_out(tmp_path, caplog, monkeypatch, method):
    monkeypatch.setattr(Recorder, "fail", method)
    report(tmp_path, "recorder")
    assert calls[-1][0] == method
    assert caplog.text.count("tracker recorder failed and is left out from now on: ConnectionError: no network") == 1
    assert len(entries(tmp_path)) == 1


def test_a_tracker_that_takes_no_lists_gets_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "SINGLE", ("recorder",))
    report(tmp_path, "recorder")
    assert "log_images" not in {call[0] for call in calls}


def get(port, page="/metrics"):
    with urllib.request.urlopen(f"http://localhost:{port}{page}", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_reads_the_newest_values(tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setenv("NAIGN_METRICS", str(port))
    with opened(tmp_path, "", active=False) as monitor:  # of another host
        for seen in (10, 20):
            monitor.scalars({"loss/total": 0.25, "loss/imle": math.nan}, seen, images_seen=seen, round=1)
        text = get(port)
    lines = set(text.splitlines())
    assert lines >= {
        "naign_loss_total 0.25",
        "naign_loss_imle nan",
        "naign_images_seen 20.0",
        "naign_images_goal 100.0",
        "naign_round 1.0",
    }
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
        )
        assert not [line for line in checked.stderr.splitlines() if "no help text" not in line]
    series = {name.replace("naign_", "") for name in re.findall(r"naign_\w+", DASHBOARD.read_text())}
    table = (ROOT / "docs/tracking.md").read_text().partition("## What a run reports")[2]
    reported = {name.replace("/", "_") for name in re.findall(r"`(\w+/\w+|\w+_seen|round)`", table)}
    assert series <= reported | {"images_goal", "reported_timestamp_seconds"}
    with pytest.raises(OSError):  # it is closed
        get(port)


def test_clients_that_hang_do_not_keep_others_from_an_answer(tmp_path, monkeypatch, capfd):
    port = free_port()
    monkeypatch.setenv("NAIGN_METRICS", str(port))
    with opened(tmp_path, ""):
        hanging = [socket.create_connection(("localhost", port)) for _ in range(40)]
        get(port)
        for client in hanging:
            client.close()
        get(port)
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_in_use_is_refused(tmp_path, monkeypatch):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("NAIGN_METRICS", str(port))
        with refused(f"port {port} cannot be opened .*choose another --metrics"):
            opened(tmp_path, "")


def test_a_disk_that_fails_is_the_user_s_to_mend(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with refused("reports cannot be written .*make room"):
        report(tmp_path, "")


def test_a_full_disk_is_worth_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(JsonLines, "log", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(Unavailable, match="No space left on device.*make room"):
        report(tmp_path, "")


@pytest.mark.parametrize(
    "name, known",
    [
        ("tensorbord", "choose one of jsonl, tensorboard, .*wandb.*did you mean tensorboard"),
        ("broken", "no_such_module"),
        ("comet_ml", "not installed: pip install comet_ml"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(name, known):
    with refused(f"report.trackers is '{name}'.*{known}"):
        find_trackers(name)
