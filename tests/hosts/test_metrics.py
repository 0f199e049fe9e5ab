"""`naign launch --metrics`: what Prometheus reads, and /healthz of a run that hangs."""
# ruff: noqa: F811

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from naign.cluster import launch, metrics
from naign.cluster.metrics import Metrics
from naign.errors import BAD_INPUT
from naign.observe.heartbeat import Heartbeat
from tests.conftest import ROOT
from tests.hosts.test_launch import handlers  # noqa: F401
from tests.hosts.waiting import until
from tests.servers import free_port

DASHBOARD = ROOT / "k8s/components/monitor/dashboard.json"
ROUND = {
    "data/megabytes": 1.5,
    "data/retries": 2,
    "loss/total": 0.25,
    "loss/imle": math.nan,
    "match/distance": 3.0,
}


def get(port, page):
    try:
        with urllib.request.urlopen(f"http://localhost:{port}{page}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


@pytest.fixture
def page():
    served = Metrics(free_port(), 0)
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def beaten(page, tmp_path, monkeypatch):
    """A page, and what replaces its file; neither has done anything yet."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    page.watch(tmp_path / "heartbeat", generation=3)
    return page, Heartbeat(Path(os.environ["NAIGN_HEARTBEAT"]), images=1000, seen=100)


def test_rounds_are_summed_and_values_are_the_newest(beaten):
    page, heartbeat = beaten
    for seen in (200, 300):
        heartbeat.beat(ROUND, seen=seen, phases={"fit": seen / 100}, checkpoint=time.monotonic() - 50)
    status, text = get(page.server_address[1], "/metrics")
    lines = set(text.splitlines())
    assert status == 200 and lines >= {
        "naign_rounds_total 2",
        "naign_images_total 200",
        "naign_images_seen 300",
        "naign_images_goal 1000",
        "naign_data_read_bytes_total 3000000.0",
        "naign_data_retries_total 4.0",
        'naign_phase_seconds_total{phase="fit"} 3.0',
        'naign_loss{term="total"} 0.25',
        'naign_loss{term="imle"} nan',
        "naign_generation 3",
        "naign_restarts_total 2",
        "# TYPE naign_rounds_total counter",
        "# TYPE naign_loss gauge",
    }
    age = float(re.search(r"^naign_checkpoint_age_seconds (.*)$", text, re.M)[1])
    assert 50 <= age < 60
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
        )
        assert not [line for line in checked.stderr.splitlines() if "no help text" not in line]


def test_a_run_is_healthy_until_its_rounds_take_much_longer_than_before(beaten, monkeypatch):
    page, heartbeat = beaten
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert page.health()[0] == 200
    now += metrics.START + 1
    assert page.health()[0] == 503  # no first round
    heartbeat.beat(ROUND, seen=200, phases={}, checkpoint=now)
    now += 1000
    heartbeat.beat(ROUND, seen=300, phases={}, checkpoint=now)
    longest = metrics.START + 1  # the first one
    now += metrics.FACTOR * longest - 1
    assert page.health()[0] == 200
    now += 2
    assert page.health()[0] == 503
    heartbeat.beat(ROUND, seen=1000, phases={}, checkpoint=now)  # the last one: a checkpoint is still to be sent
    now += metrics.START - 1
    assert page.health()[0] == 200


def test_short_rounds_have_the_least_limit_and_a_host_that_waits_for_others_is_healthy(beaten, page):
    assert "limit 3600" in page.health()[1]
    beaten[1].beat(ROUND, seen=200, phases={}, checkpoint=0)
    healthy = (200, f"0 s since a round ended or the ranks started, limit {metrics.LEAST:.0f}\n")
    assert page.health() == get(page.server_address[1], "/healthz?probe=1") == healthy
    for path in ("/", "/healthz/"):
        assert get(page.server_address[1], path)[0] == 404


def test_clients_that_hang_or_go_away_do_not_keep_a_probe_from_its_answer(page, capfd, monkeypatch):
    monkeypatch.setattr(metrics._Handler, "timeout", 0.5)
    before = threading.active_count()
    port = page.server_address[1]
    hanging = [socket.create_connection(("localhost", port)) for _ in range(40)]
    assert get(port, "/healthz")[0] == 200
    until(lambda: threading.active_count() <= before)
    for client in hanging:
        client.close()
    assert get(port, "/healthz")[0] == 200 and not capfd.readouterr().err


def test_gpus_are_read_by_nvml(monkeypatch):
    class NVMLError(Exception):
        pass

    def utilization(index):
        if index:
            raise NVMLError  # in parts
        return SimpleNamespace(gpu=75)

    fake = ModuleType("pynvml")
    vars(fake).update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=int,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=3, total=8),
        nvmlDeviceGetUtilizationRates=utilization,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert metrics.read_gpus() == {
        'gpu_memory_used_bytes{gpu="0"}': 3,
        'gpu_memory_bytes{gpu="0"}': 8,
        'gpu_utilization_ratio{gpu="0"}': 0.75,
        'gpu_memory_used_bytes{gpu="1"}': 3,
        'gpu_memory_bytes{gpu="1"}': 8,
    }
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert metrics.read_gpus() == {}


def test_a_port_in_use_ends_before_training(handlers, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert launch.main([f"--metrics={port}", f"--run.path={tmp_path}/run"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: port {port} cannot be opened on host 0 (Address already in use" in line
    assert line.endswith("): choose another --metrics")
    assert not (tmp_path / "run").exists()


def test_the_dashboard_and_the_page_name_series_that_exist(beaten, monkeypatch):
    page, heartbeat = beaten
    heartbeat.beat(ROUND, seen=200, phases={"fit": 1.0}, checkpoint=0)
    names = ("gpu_memory_used_bytes", "gpu_memory_bytes", "gpu_utilization_ratio")
    monkeypatch.setattr(metrics, "read_gpus", lambda: dict.fromkeys(names, 1.0))
    exist = set(re.findall(r"^(naign_\w+)", page.page(), re.M))
    table = (ROOT / "docs/tracking.md").read_text().partition("| series |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(naign_\w+)", table)) == exist
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"naign_\w+", target["expr"])) <= exist
