"""A host that loses another one keeps its process, and meets the one that replaces it."""

import os
import signal
import sys

import psutil
import pytest

from naign.errors import FAILED, INTERRUPTED
from tests.conftest import environment
from tests.e2e.runs import rounds_of
from tests.hosts.waiting import until
from tests.servers import free_port


@pytest.mark.slow
def test_a_host_keeps_its_process_when_another_is_lost_and_heeds_a_signal_meanwhile(small, tmp_path):
    options = (
        f"--port={free_port()}",
        *small,
        "--train.images=307200",
        "--run.path=run",
        "--checkpoint.rounds=2",
    )
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    log = logs[0].read_text

    def start(index):
        named = environment(NAIGN_HOSTS="2", NAIGN_HEAD="localhost", JOB_COMPLETION_INDEX=str(index), NAIGN_START="s")
        with logs[index].open("a") as output:
            command = [sys.executable, "-m", "naign.cli", "launch", *options]
            return psutil.Popen(
                command,
                cwd=tmp_path,
                env=named,
                stderr=output,
                stdout=output,
            )

    def staying():
        return log().count("this host stays")

    def rounds():
        return rounds_of(tmp_path / "run")

    first = start(0)
    second = start(1)
    try:
        until(lambda: rounds() > 3, log)
        (rank,) = second.children()
        rank.kill()
        assert second.wait(60) == FAILED and "SIGKILL: out of memory?" in logs[1].read_text().splitlines()[-1]
        until(lambda: staying() == 1, log)
        second = start(1)
        until(lambda: "resuming from" in log(), log)
        before = rounds()
        until(lambda: rounds() > before, log)
        second.kill()
        until(lambda: staying() == 2, log)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == INTERRUPTED, log()
        assert "stopped on request" in log().splitlines()[-1]
    finally:
        for process in (first, second):
            if process.is_running():
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
