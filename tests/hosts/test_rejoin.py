"""A host that loses another one keeps its process, and meets the one that replaces it."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from naign.errors import FAILED, INTERRUPTED
from tests.conftest import SMALL, environment
from tests.servers import free_port


def until(condition: Any, log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_keeps_its_process_when_another_is_lost_and_heeds_a_signal_meanwhile(digits, tmp_path):
    options = (
        f"--port={free_port()}",
        f"--data.path={digits}",
        *SMALL,
        "--train.images=307200",
        "--run.path=run",
        "--checkpoint.rounds=2",
    )
    logs, metrics = [tmp_path / "0.log", tmp_path / "1.log"], tmp_path / "run/metrics.jsonl"

    def start(index: int) -> psutil.Popen:
        named = environment(NAIGN_HOSTS="2", NAIGN_HEAD="localhost", JOB_COMPLETION_INDEX=str(index), NAIGN_START="s")
        with logs[index].open("a") as log:
            command = [sys.executable, "-m", "naign.cli", "launch", *options]
            return psutil.Popen(command, cwd=tmp_path, env=named, stderr=log, stdout=log)

    def staying() -> int:
        return logs[0].read_text().count("this host stays")

    def rounds() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    first, second = start(0), start(1)
    try:
        until(lambda: rounds() > 3, logs[0])
        (rank,) = second.children()
        rank.kill()
        assert second.wait(60) == FAILED and "SIGKILL: out of memory?" in logs[1].read_text().splitlines()[-1]
        until(lambda: staying() == 1, logs[0])
        second = start(1)
        until(lambda: "resuming from" in logs[0].read_text(), logs[0])
        before = rounds()
        until(lambda: rounds() > before, logs[0])
        second.kill()
        until(lambda: staying() == 2, logs[0])
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == INTERRUPTED, logs[0].read_text()
        assert "stopped on request" in logs[0].read_text().splitlines()[-1]
    finally:
        for process in (first, second):
            if process.is_running():
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
