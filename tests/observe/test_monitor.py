"""What is reported goes to every tracker, and one of another package harms nobody."""

import errno
import json
import math
import shutil
import ssl
import subprocess
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import EntryPoint
from threading import Event, Thread
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from naign.errors import InputError, Unavailable
from naign.observe import monitor
from naign.observe.monitor import WAITING, Background, Monitor, trackers_hang
from naign.observe.trackers import JsonLines, TrainJob, find_trackers
from naign.settings import registry

calls = []


class Recorder:
    """A tracker of another package. `fail` names the method that raises, `hold` the one that waits for `go`."""

    fail = hold = ""
    go = Event()

    def __init__(self, settings, folder, images_seen):
        self.record("build", settings, folder.name, images_seen)

    def record(self, name, *values):
        calls.append((name, *values))
        if name == self.fail:
            raise ConnectionError("no network")
        if name == self.hold:
            self.go.wait()

    def __getattr__(self, name):
        return lambda *values: self.record(name, *values)


RECORDER = (dict, Recorder)
PLAIN = (None, Recorder)  # without settings


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    points = {
        "recorder": EntryPoint("recorder", f"{__name__}:RECORDER", "naign.trackers"),
        "plain": EntryPoint("plain", f"{__name__}:PLAIN", "naign.trackers"),
        "broken": EntryPoint("broken", "no_such_module:X", "naign.trackers"),
    }
    monkeypatch.setattr(registry, "_entry_points", lambda group: points if group == "naign.trackers" else {})
    monkeypatch.setattr(Recorder, "fail", "")
    monkeypatch.setattr(Recorder, "hold", "")
    monkeypatch.setattr(Recorder, "go", Event())
    calls.clear()


def opened(folder, trackers, images_seen=0, active=True):
    settings = {"seed": 0, "train.lr": 2e-3, "data.split": "train"}
    given = {"images": 100, "config": "seed: 0", "settings": settings, "trackers": trackers}
    return Monitor(folder, active=active, seen=images_seen, **given)


def report(folder, trackers, images_seen=0, active=True):
    with opened(folder, trackers, images_seen, active) as monitor:
        monitor.advance(10)
        monitor.scalars({"loss/total": 0.5}, images_seen + 10, round=1, step=2)
        monitor.histogram("match/distance", torch.ones(3), images_seen + 10)
        monitor.picture("samples", Image.new("RGB", (4, 4)), images_seen + 10)
        monitor.flush()


def test_every_tracker_is_told_everything(tmp_path):
    report(tmp_path, "tensorboard, recorder")
    assert [call[0] for call in calls] == [
        "build",
        "configuration",
        "scalars",
        "histogram",
        "picture",
        "flush",
        "close",
    ]
    assert calls[0] == ("build", {}, tmp_path.name, 0)
    assert calls[1] == ("configuration", {"seed": 0, "train.lr": 2e-3, "data.split": "train"}, "seed: 0")
    assert calls[2] == ("scalars", {"loss/total": 0.5}, 10, {"round": 1, "step": 2})
    (entry,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert entry.pop("time") and entry == {"images_seen": 10, "round": 1, "step": 2, "loss/total": 0.5}
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "samples/samples-0000000010.png").exists()


@pytest.mark.parametrize("trackers", ["", "[]", "jsonl", "recorder", "['plain', jsonl]"])
def test_tensorboard_can_be_left_out_and_metrics_cannot(tmp_path, trackers):
    report(tmp_path, trackers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples"]
    assert bool(calls) == ("recorder" in trackers or "plain" in trackers)


def test_every_line_of_the_metrics_is_valid_json(tmp_path):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    with opened(tmp_path, "recorder") as monitor:
        monitor.scalars({"quality/fd": math.inf, "loss/total": math.nan, "loss/imle": 0.5}, 10, round=1)
    entry = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert entry.pop("time") and entry == {"images_seen": 10, "round": 1, "loss/imle": 0.5}
    assert calls[2][1]["quality/fd"] == math.inf  # others show that it is not finite


def test_a_rank_that_is_not_the_first_reports_nothing(tmp_path):
    report(tmp_path, "tensorboard,recorder", active=False)
    assert not calls and not list(tmp_path.iterdir())


def test_a_resumed_run_drops_what_was_reported_later(tmp_path):
    lines = [json.dumps({"images_seen": min(15, seen), "codes_seen": max(0, seen - 15)}) for seen in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"images_seen": 4']))
    report(tmp_path, "", images_seen=20)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["images_seen"] + entry.get("codes_seen", 0), "loss/total" in entry) for entry in entries] == [
        (10, False),
        (20, False),
        (30, True),
    ]


@pytest.mark.parametrize("method", ["build", "configuration", "scalars", "flush", "close"])
def test_a_tracker_of_another_package_that_fails_is_left_out(tmp_path, caplog, monkeypatch, method):
    monkeypatch.setattr(Recorder, "fail", method)
    report(tmp_path, "recorder")
    assert calls[-1][0] == method and caplog.text.count("tracker recorder failed") == 1
    assert "no network" in caplog.text and (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_tracker_that_raises_no_exception_is_left_out(caplog):
    class Panic(BaseException):
        """As a library in Rust raises it."""

    def build():
        raise Panic("in Rust")

    tracker = Background("rusty", build)
    tracker.wait(time.monotonic() + 10)
    assert tracker.failed and "tracker rusty failed and is left out from now on: Panic: in Rust" in caplog.text


@pytest.mark.parametrize("method", ["build", "scalars", "close"])
def test_a_tracker_that_hangs_is_not_waited_for(tmp_path, caplog, monkeypatch, method):
    monkeypatch.setattr(Recorder, "hold", method)
    monkeypatch.setattr(monitor, "PATIENCE", 0.2)
    report(tmp_path, "recorder")
    assert calls[-1][0] == method and trackers_hang()
    assert caplog.text.count("tracker recorder has not finished") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    Recorder.go.set()


def test_reports_that_a_tracker_has_no_room_for_are_dropped_and_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Recorder, "hold", "configuration")
    number = WAITING + 10
    with opened(tmp_path, "recorder") as monitor:
        while len(calls) < 2:  # until the queue is empty
            time.sleep(0.001)
        for images_seen in range(1, number + 1):
            monitor.scalars({"loss/total": 0.5}, images_seen, round=images_seen)
        Recorder.go.set()
    assert [call[2] for call in calls if call[0] == "scalars"] == list(range(1, WAITING + 1))
    assert caplog.text.count("tracker recorder does not keep up") == 1
    assert "tracker recorder has missed 10 reports" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == number


def test_tensorboard_drops_what_a_resumed_run_reports_again(tmp_path):
    report(tmp_path, "tensorboard")
    report(tmp_path, "tensorboard", images_seen=5)  # resumes before what was reported
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/total")] == [15]
    assert [event.step for event in board.Images("samples")] == [15]
    assert board.Tags()["histograms"] == ["match/distance"] and "config/text_summary" in board.Tags()["tensors"]


def test_a_disk_that_fails_is_the_user_s_to_mend(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="reports cannot be written .*make room"):
        report(tmp_path, "")


def test_a_full_disk_is_worth_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(JsonLines, "scalars", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(Unavailable, match="No space left on device.*make room"):
        report(tmp_path, "")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("tensorbord", "choose one of jsonl, tensorboard, .*wandb.*did you mean tensorboard"),
        ("broken", "no_such_module"),
        ("comet_ml", "not installed: pip install comet_ml"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(name, known):
    with pytest.raises(InputError, match=f"report.trackers is '{name}'.*{known}"):
        find_trackers(name)


@pytest.fixture
def status_server(tmp_path, monkeypatch):
    """What Kubeflow Trainer's controller serves for one TrainJob: its requests, and the code of its next answers."""
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    posts, codes = [], [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            posts.append((self.path, self.headers["Authorization"], body["trainerStatus"]))
            self.send_response(codes[-1])
            self.end_headers()

        def log_message(self, *_):
            pass

    server, context = HTTPServer(("localhost", 0), Handler), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("first\n")
    values = {"URL": f"https://localhost:{server.server_port}/job", "TOKEN": tmp_path / "token", "CA_CERT": certificate}
    for name, value in values.items():
        monkeypatch.setenv(f"KUBEFLOW_TRAINER_SERVER_{name}", str(value))
    yield posts, codes, tmp_path / "token"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_the_status_of_a_train_job_has_progress_and_metrics(status_server, tmp_path, monkeypatch, caplog):
    posts, codes, token = status_server
    name, (_, build) = list(find_trackers("").items())[-1]
    assert name == "trainjob" and not (tmp_path / "trackers").exists()
    monkeypatch.setattr(TrainJob, "EVERY", 0.2)
    tracker = build(None, tmp_path, 0)
    tracker.configuration({"train.images": 1000, "match.round": 100, "train.passes": 1}, "")
    tracker.scalars({"loss/total": 0.25, "loss/none": math.nan}, 100, {"round": 0})
    tracker.scalars({"loss/total": 0.24}, 200, {"round": 1})  # too soon
    time.sleep(0.25)
    token.write_text("second\n")
    tracker.scalars({"loss/total": 0.23}, 300, {"round": 2})
    first, second = posts
    assert first[:2] == ("/job", "Bearer first") and second[1] == "Bearer second"
    assert first[2]["progressPercentage"] == 10 and "estimatedRemainingSeconds" not in first[2]
    assert first[2]["metrics"] == [{"name": "loss/total", "value": "0.25"}]
    assert second[2]["progressPercentage"] == 30 and second[2]["estimatedRemainingSeconds"] in (1, 2)
    datetime.strptime(second[2]["lastUpdatedTime"], "%Y-%m-%dT%H:%M:%SZ")
    codes.append(403)
    for number in (9, 9):  # the last round is always sent
        tracker.scalars({}, 1000, {"round": number})
    assert posts[-1][2]["progressPercentage"] == 100 and len(posts) == 4
    assert caplog.text.count("cannot be updated: HTTP Error 403") == 1
