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


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_that_starts_the_ranks_again(digits, tmp_path):
    where = ["--master_port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "2", *where]
    options = [f"--data.path={digits}", *SMALL, "--train.images=20480", "--checkpoint.rounds=5", "--run.path=run"]
    metrics = tmp_path / "run/metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command, str(ROOT / "pipeline/train.py"), *options],
            cwd=tmp_path,
            env=environment(ACCELERATE_USE_CPU="true"),
            stdout=log,
            stderr=log,
        )
        try:
            for rank, rounds in ((1, 12), (0, 30)):
                end = time.monotonic() + 90
                while not (metrics.exists() and metrics.read_text().count("\n") >= rounds):
                    assert launcher.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                    time.sleep(0.02)
                os.kill(children(launcher.pid)[rank], signal.SIGKILL)
                while metrics.read_text().count("\n") >= rounds and launcher.poll() is None:
                    time.sleep(0.01)  # until the next attempt has dropped what it does again
                    if time.monotonic() > end:
                        break
            assert launcher.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            launcher.kill()
    said = (tmp_path / "log").read_text()
    assert said.count("resuming from run/checkpoints/step-") == 2
    assert metrics.read_text().count("\n") == 80
