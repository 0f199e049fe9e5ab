"""launch/slurm.sbatch: on a real Slurm of two nodes it is signalled, goes on, and ends."""

import time

import pytest

from tests.conftest import ROOT
from tests.e2e.runs import rounds_of
from tests.hosts.slurm import Slurm, possible
from tests.programs import execute, succeeded

real = pytest.mark.skipif(bool(possible()), reason=possible() or "possible")


def with_programs(folder, script, **programs):
    """Run a batch script where Slurm's programs are shell scripts."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environ = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "HOME": "/home/me",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "10",
    }
    return execute(["bash", "-c", script], folder, env=environ)


def test_a_host_that_is_lost_after_ten_planned_stops_does_not_end_the_job(tmp_path):
    srun = "echo >> starts; [ $(wc -l < starts) = 2 ] || exit 76"
    done = succeeded(with_programs(tmp_path, (ROOT / "launch/slurm.sbatch").read_text(), srun=srun))
    assert "ended with 76: all hosts start again" in done.stdout


def test_hosts_meet_on_the_first_node_of_the_job(tmp_path):
    script = (ROOT / "launch/slurm.sbatch").read_text()
    done = succeeded(with_programs(tmp_path, script, scontrol="printf 'n3\\nn4\\n'", srun='echo "at $NAIGN_HEAD"'))
    assert "at n3\n" in done.stderr


def until(met, slurm, place, seconds=120):
    end = time.monotonic() + seconds
    while not met():
        files = [*sorted(place.glob("*.log")), *sorted(slurm.folder.glob("slurm*.log"))]
        logs = "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files)
        assert time.monotonic() < end, logs + slurm.ask("squeue") + slurm.ask("sinfo -R")
        time.sleep(0.2)


@real
@pytest.mark.slow
def test_a_job_is_signalled_goes_on_and_ends(small, tmp_path):
    place = tmp_path / "submitted"
    place.mkdir()
    options = [*small, "--train.images=30720", "--checkpoint.rounds=10", "--run.path=run"]
    with Slurm() as slurm:
        job = slurm.submit(place, *options)
        until(lambda: rounds_of(place / "run") >= 15, slurm, place)
        assert "2 x cpu" in "".join(file.read_text() for file in place.glob("*-host*.log"))
        slurm.ask(f"scancel --signal=USR1 {job}")  # as --signal=USR1@120 does before the time is over
        until(lambda: "queued again" in (place / f"naign-{job}.log").read_text(), slurm, place)
        # Slurm holds back what was queued again for its begin time, two minutes.
        until(lambda: slurm.state(job).startswith("PENDING"), slurm, place)
        time.sleep(5)  # a node refuses a job that was ended there in the same moments: "credential revoked"
        slurm.ask(f"scontrol update JobId={job} StartTime=now")
        until(lambda: slurm.state(job).startswith(("COMPLETED", "FAILED")), slurm, place)
        assert slurm.state(job) == "COMPLETED 0:0"
    assert rounds_of(place / "run") == 120
    said = (place / f"naign-{job}.log").read_text()
    assert "ended with 75: queued again" in said and f"start 1.0 of job {job}" in said


@real
@pytest.mark.slow
def test_a_mistake_ends_the_job(small, tmp_path):
    place = tmp_path / "submitted"
    place.mkdir()
    with Slurm() as slurm:
        job = slurm.submit(place, *small, "--train.batch=33", "--run.path=run")
        until(lambda: slurm.state(job).startswith(("COMPLETED", "FAILED")), slurm, place)
        assert slurm.state(job) == "FAILED 2:0"
    assert "is not a multiple of train.batch=33" in (place / f"naign-{job}-host0.log").read_text()


@real
@pytest.mark.slow
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
