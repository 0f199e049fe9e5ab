"""launch/slurm.sbatch on a real Slurm of two nodes: trains, is signalled, queues itself again, goes on, ends."""

import time
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.hosts.slurm import Slurm, possible

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(possible()), reason=possible() or "possible")]


def until(met, slurm: Slurm, place: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not met():
        files = [*sorted(place.glob("*.log")), *sorted(slurm.folder.glob("slurm*.log"))]
        logs = "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files)
        assert time.monotonic() < end, logs + slurm.ask("squeue") + slurm.ask("sinfo", "-R")
        time.sleep(0.2)


def test_a_job_is_signalled_goes_on_and_ends(digits, tmp_path):
    place = tmp_path / "submitted"
    place.mkdir()
    metrics = place / "run/metrics.jsonl"

    def rounds() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    with Slurm() as slurm:
        options = [f"--data.path={digits}", *SMALL, "--train.images=30720", "--checkpoint.rounds=10", "--run.path=run"]
        job = slurm.submit(place, *options)
        until(lambda: rounds() >= 15, slurm, place)
        assert "2 x cpu" in "".join(file.read_text() for file in place.glob("*-host*.log"))
        slurm.ask("scancel", "--signal=USR1", job)  # as --signal=USR1@120 does before the time is over
        until(lambda: "queued again" in (place / f"naign-{job}.log").read_text(), slurm, place)
        # Slurm holds back what was queued again for its begin time, two minutes.
        until(lambda: slurm.state(job).startswith("PENDING"), slurm, place)
        time.sleep(5)  # a node refuses a job that was ended there in the same moments: "credential revoked"
        slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        until(lambda: slurm.state(job).startswith(("COMPLETED", "FAILED")), slurm, place)
        assert slurm.state(job) == "COMPLETED 0:0"
    assert rounds() == 120
    said = (place / f"naign-{job}.log").read_text()
    assert "ended with 75: queued again" in said and f"start 1.0 of job {job}" in said


def test_a_mistake_ends_the_job(digits, tmp_path):
    place = tmp_path / "submitted"
    place.mkdir()
    with Slurm() as slurm:
        job = slurm.submit(place, f"--data.path={digits}", *SMALL, "--train.batch=33", "--run.path=run")
        until(lambda: slurm.state(job).startswith(("COMPLETED", "FAILED")), slurm, place)
        assert slurm.state(job) == "FAILED 2:0"
    assert "no multiple of train.batch=33" in (place / f"naign-{job}-host0.log").read_text()


def test_hosts_start_again_within_the_allocation_until_bad_input_of_one_ends_the_job(tmp_path):
    place = tmp_path / "submitted"
    (place / ".venv/bin").mkdir(parents=True)
    (place / ".venv/bin/activate").write_text(f"PATH={place}:$PATH\n")  # which the script looks for
    (place / "naign").write_text("#!/bin/sh\nexit $((SLURM_PROCID ? 76 : SLURM_STEP_ID + 1))\n")  # a crash, then 2
    (place / "naign").chmod(0o755)
    with Slurm() as slurm:
        job = slurm.submit(place)
        until(lambda: slurm.state(job).startswith(("COMPLETED", "FAILED")), slurm, place)
        assert slurm.state(job) == "FAILED 2:0"
    said = (place / f"naign-{job}.log").read_text()
    assert "task 1: Exited with exit code 76" in said and said.endswith("ended with 2\n")
    assert said.count("all hosts start again") == 1 and f"start 0.1 of job {job}" in said
