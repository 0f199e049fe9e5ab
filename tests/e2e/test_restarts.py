"""torchrun and Accelerate start a failed run's ranks again, and it goes on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT, SMALL, environment, forked
from tests.distributed.ranks import free_port
from tests.e2e.runs import rounds_of
from tests.hosts.waiting import until

pytestmark = pytest.mark.slow

RESUMED = "resuming from run/checkpoints/step-"


class Torchrun:
    """Launchers of one run in a folder, which stands for all machines: a context manager."""

    def __init__(self, folder, digits, *options, begin=forked):
        self.folder = folder
        self.env = begin(ACCELERATE_USE_CPU="true")
        self.run = folder / "run"
        self.command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--max_restarts=2",
            *options,
            str(ROOT / "pipeline/train.py"),
            f"--data.path={digits}",
            *SMALL,
            "--train.images=10240",
            "--checkpoint.rounds=5",
            "--run.path=run",
        ]
        self.started = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for launcher in self.started:
            launcher.kill()
            launcher.wait()

    def start(self):
        with (self.folder / "log").open("a") as log:
            self.started.append(
                subprocess.Popen(
                    self.command,
                    cwd=self.folder,
                    env=self.env,
                    stdout=log,
                    stderr=log,
                )
            )
        return self.started[-1]

    def ranks(self):
        """Process ids of the ranks, in their order; of forked launchers they are no children."""
        here = [process.pid for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(self.folder)]
        return sorted(set(here) - {launcher.pid for launcher in self.started})

    def said(self):
        return (self.folder / "log").read_text()

    def until(self, met):
        until(lambda: met() or self.started[0].poll() is not None, self.said, seconds=120)
        assert met(), self.said()


@pytest.mark.parametrize("rendezvous", ["static", "standalone"])
def test_a_launcher_that_starts_the_ranks_again(rendezvous, digits, tmp_path):
    where = "--standalone" if rendezvous == "standalone" else f"--master_port={free_port()}"
    with Torchrun(tmp_path, digits, "--nproc_per_node=2", where) as job:
        launcher = job.start()
        for turn, rank, rounds in ((1, 1, 12), (2, 0, 24)):
            job.until(lambda: rounds_of(job.run) >= rounds)  # noqa: B023
            os.kill(job.ranks()[rank], signal.SIGKILL)
            job.until(lambda: job.said().count(RESUMED) == turn)  # noqa: B023
        assert launcher.wait(timeout=120) == 0, job.said()
    assert job.said().count(RESUMED) == 2
    assert rounds_of(job.run) == 40


def test_a_job_that_loses_a_machine_goes_on_with_those_that_are_left(digits, tmp_path):
    options = (
        "--nnodes=1:2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}",
        "--rdzv_id=job",
        "--rdzv_conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3",
    )
    with Torchrun(tmp_path, digits, *options, begin=environment) as job:
        stays = job.start()
        time.sleep(1)
        lost = job.start()
        job.until(lambda: rounds_of(job.run) >= 12)
        assert "x 2 ranks" in job.said()
        for process in (*psutil.Process(lost.pid).children(), lost):
            process.kill()
        assert stays.wait(timeout=180) == 0, job.said()
    assert RESUMED in job.said() and "x 1 ranks" in job.said()
    assert rounds_of(job.run) == 40
