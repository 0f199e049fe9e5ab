"""torchrun and Accelerate start a failed run's ranks again, and it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, environment
from tests.distributed.ranks import free_port

pytestmark = pytest.mark.slow

RESUMED = "resuming from run/checkpoints/step-"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "pipeline/train.py")]


def until(met, launcher, log):
    end = time.monotonic() + 120
    while not met():
        assert launcher.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rendezvous", ["static", "standalone"])
def test_a_launcher_that_starts_the_ranks_again(rendezvous, digits, tmp_path):
    where = ["--standalone"] if rendezvous == "standalone" else ["--master_port", str(free_port())]
    command = torchrun("--nproc_per_node", "2", "--max_restarts", "2", *where)
    options = [f"--data.path={digits}", *SMALL, "--train.images=20480", "--checkpoint.rounds=5", "--run.path=run"]
    metrics, said = tmp_path / "run/metrics.jsonl", tmp_path / "log"
    with said.open("w") as log:
        launcher = subprocess.Popen(
            [*command, *options], cwd=tmp_path, env=environment(ACCELERATE_USE_CPU="true"), stdout=log, stderr=log
        )
        try:
            for rank, rounds in ((1, 12), (0, 30)):
                until(lambda: metrics.exists() and metrics.read_text().count("\n") >= rounds, launcher, said)  # noqa: B023
                os.kill(children(launcher.pid)[rank], signal.SIGKILL)
                until(lambda: said.read_text().count(RESUMED) == 1 + (rank == 0), launcher, said)  # noqa: B023
            assert launcher.wait(timeout=120) == 0, said.read_text()
        finally:
            launcher.kill()
    assert said.read_text().count(RESUMED) == 2
    assert metrics.read_text().count("\n") == 80


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_that_loses_a_machine_goes_on_with_those_that_are_left(digits, tmp_path):
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "job"]
    conf = ["--rdzv_conf", "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"]
    command = torchrun("--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "2", *meet, *conf)
    options = [f"--data.path={digits}", *SMALL, "--train.images=20480", "--checkpoint.rounds=5", "--run.path=run"]
    metrics, said = tmp_path / "run/metrics.jsonl", tmp_path / "log"
    agents = []
    with said.open("w") as log:
        try:
            for _ in range(2):  # each agent stands for a machine
                agents += [
                    subprocess.Popen(
                        [*command, *options],
                        cwd=tmp_path,
                        env=environment(ACCELERATE_USE_CPU="true"),
                        stdout=log,
                        stderr=log,
                    )
                ]
                time.sleep(1)
            until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 12, agents[0], said)
            assert "x 2 ranks" in said.read_text()
            for process in (*children(agents[1].pid), agents[1].pid):
                os.kill(process, signal.SIGKILL)
            assert agents[0].wait(timeout=180) == 0, said.read_text()
        finally:
            for agent in agents:
                agent.kill()
                agent.wait()
    assert RESUMED in said.read_text() and "x 1 ranks" in said.read_text()
    assert metrics.read_text().count("\n") == 80
