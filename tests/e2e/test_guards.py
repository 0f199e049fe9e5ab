"""What goes wrong while a run is under way: numbers that are not finite, a full disk, a bucket that is taken away."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from naign.checkpoint.bucket import newest_first
from naign.checkpoint.writer import newest_checkpoint
from naign.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST
from naign.storage.store import open_store
from tests.conftest import ROOT, SMALL, start, train_command
from tests.e2e.ranks import Job
from tests.e2e.runs import column, newest, reports, rounds_of, wait_for_rounds, weights
from tests.programs import ends, execute, refused, succeeded

pytestmark = pytest.mark.slow

POISON = """
import runpy
import sys
import torch
from naign.training import loop
from naign.model import losses
made, count = losses.compute_losses, [0]
def poisoned(*args, **kwargs):
    count[0] += 1
    terms = made(*args, **kwargs)
    # Only this rank, and only in these steps.
    if {rank} == int(__import__("os").environ.get("RANK", 0)) and count[0] in {steps}:
        terms["total"] = terms["total"] * float("nan")
    return terms
loop.compute_losses = poisoned
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({program!r}, run_name="__main__")
"""
"""The main job, but for some losses of one rank, which become NaN."""


def poisoned(folder, steps, rank, *options, world=1):
    program = folder / "poisoned.py"
    program.write_text(POISON.format(program=str(ROOT / "pipeline/train.py"), steps=steps, rank=rank))
    command = [sys.executable]  # a launcher has its own exit code
    if world > 1:
        command = train_command(ranks=world)[:-1]
    return [*command, str(program), "--run.path=run", *SMALL, *options]


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_costs_its_step_and_no_more(world, digits, tmp_path):
    options = [f"--data.path={digits}", "--train.images=1024", "--train.ema=0.9", "--objective.third=none"]
    command = poisoned(
        tmp_path,
        [5, 6, 20],
        world - 1,
        *options,
        world=world,
    )
    done = succeeded(execute(command, tmp_path))
    assert done.stderr.count("is not finite: skipped") == 3 and "round 0] warning: a step of round 0" in done.stderr
    last = reports(tmp_path / "run")[-1]
    assert last["train/skipped"] == 3 and 0 < last["loss/total"] < 2
    for name in ("model", "ema"):
        assert all(value.isfinite().all() for value in weights(tmp_path / "run", name).values())


def test_too_many_of_them_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(digits, tmp_path):
    options = [f"--data.path={digits}", "--train.images=4096", "--checkpoint.rounds=1"]
    command = poisoned(tmp_path, range(18, 100), 0, *options)
    refused(execute(command, tmp_path), "10 steps in a row", "step-00000024", "train.lr")
    assert newest(tmp_path / "run").name == "step-00000024"  # its last steps were skipped


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_leaves_the_checkpoint_before(small, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}".split()
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        options = [*small, "--train.images=200000", "--checkpoint.rounds=1"]
        job = start(tmp_path, f"--run.path={disk}/run", *options, "--checkpoint.keep=1")
        checkpoints = disk / "run/checkpoints"
        while job.poll() is None and not list(checkpoints.glob("*/manifest.json")):
            time.sleep(0.01)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
        errors = job.communicate(timeout=60)[1]  # TensorBoard's thread may leave a traceback in it
        assert job.returncode == FAILED
        for part in ("train: failed: ", "No space left", "untouched"):
            assert part in errors
        assert newest_checkpoint(checkpoints)
        (disk / "filler").unlink()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_bucket_that_cannot_be_written_is_refused_at_the_start(digits, bucket, tmp_path, monkeypatch):
    for remote, said in ((f"{bucket}-none/run", "there is no bucket"), (f"{bucket}/run", "check the credentials")):
        job = start(tmp_path, "--run.path=run", f"--data.path={digits}", f"--run.remote={remote}", *SMALL)
        ends(job, BAD_INPUT, said)
        assert not (tmp_path / "run").exists()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")


def test_a_run_that_was_lost_goes_on_from_the_bucket(small, bucket, tmp_path):
    run = tmp_path / "run"
    options = [
        *small,
        "--run.path=run",
        f"--run.remote={bucket}/run",
        "--checkpoint.rounds=2",
        "--train.images=200000",
    ]
    for count in (7, 12):
        job = start(tmp_path, *options)
        wait_for_rounds(job, run, count)
        job.terminate()
        ends(job, INTERRUPTED)
        if count == 7:
            assert newest(run)
            run.rename(tmp_path / "lost")
    rounds = column(run, "round")
    assert rounds == list(range(len(rounds)))  # what was reported before was fetched, too


def test_of_two_runs_with_one_bucket_the_later_one_has_it(small, bucket, tmp_path):
    options = [
        *small,
        f"--run.remote={bucket}/run",
        "--checkpoint.rounds=2",
        "--train.images=200000",
    ]
    with Job(tmp_path, 2, ("--run.path=first", *options)) as first:
        first.wait_for(lambda: rounds_of(tmp_path / "first"))
        second = start(tmp_path, "--run.path=second", *options)
        first.ends(BAD_INPUT, within=120)
        assert "was taken over by a run that started later" in first.said()
    second.terminate()
    ends(second, INTERRUPTED)
    for run in ("first", "second"):
        assert newest(tmp_path / run)


def test_a_bucket_of_another_run_is_refused_and_nothing_of_it_comes_here(train, small, bucket, tmp_path):
    options = [*small, "--train.images=2560"]
    remote = [*options, f"--run.remote={bucket}/run"]
    succeeded(train(*remote, "--run.path=other", "--train.lr=1e-4"))
    succeeded(train(*options, "--run.path=run"))
    names = sorted(os.listdir(tmp_path / "run/checkpoints"))
    for images in ("2560", "25600"):  # also where the one here is newer
        done = train(*remote, "--run.path=run", f"--train.images={images}")
        refused(done, "holds a run of another configuration", "train.lr: 0.0001 there")
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == names
    assert len(open_store(f"{bucket}/run/checkpoints").folders()) == 1


def test_a_last_checkpoint_that_missed_the_bucket_is_sent_by_the_same_command(small, s3, bucket, tmp_path):
    name = bucket.removeprefix("s3://")
    options = (
        *small,
        "--train.images=7680",
        "--checkpoint.rounds=50",
        "--run.path=run",
        f"--run.remote={bucket}/run",
    )
    with Job(tmp_path, 2, options) as job:
        job.wait_for(lambda: rounds_of(tmp_path / "run"))
        s3.client().delete_bucket(Bucket=name)
        job.ends(PEER_LOST, within=120)
        assert "stays local" in job.said() and "there is no bucket" in job.said()
        assert "done: the run lies in" not in job.said()
    assert newest(tmp_path / "run").name == "step-00000240"
    s3.client().create_bucket(Bucket=name)
    with Job(tmp_path, 2, options) as job:
        job.ends(0, within=120)
        assert "nothing left to do" in job.said()
    assert list(newest_first(f"{bucket}/run")) == ["step-00000240"]


def test_ranks_that_do_not_share_a_folder_are_refused(small, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "run").mkdir(parents=True)
        (tmp_path / folder / "run/.lock").touch()
        (tmp_path / folder / "run/.claim").write_text("of an earlier run")
    options = (*small, "--run.path=run")
    with Job(tmp_path, 2, options, places=("one", "two")) as job:
        job.ends(BAD_INPUT)
        assert "is not the same folder on every machine" in job.said()


def test_ranks_with_other_settings_are_refused(small, tmp_path):
    for folder, rate in (("one", 0.01), ("two", 0.5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.yaml").write_text(f"train: {{lr: {rate}}}")
    options = (*small, "--config=run.yaml", f"--run.path={tmp_path}/run")
    with Job(tmp_path, 2, options, places=("one", "two")) as job:
        job.ends(BAD_INPUT)
        assert "rank 1 has train.lr=0.5, rank 0 0.01: give all the same settings" in job.said()
    assert not (tmp_path / "run").exists()
