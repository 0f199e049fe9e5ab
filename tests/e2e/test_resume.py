"""A run that was stopped, killed or cut short goes on as if it never had been."""

import json
import os
import signal
import subprocess

import pytest
from filelock import FileLock

from naign.errors import INTERRUPTED
from tests.conftest import environment, start, train_command
from tests.e2e.runs import losses, newest, same, wait_for_rounds, weights
from tests.programs import ends, succeeded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("varied", ["none", "flow"])
def test_an_ended_run_goes_on_bit_for_bit(train, small, tmp_path, varied):
    options = [*small, "--train.images=5120", "--train.ema=0.95", "--checkpoint.rounds=4"]
    if varied == "flow":
        options += ["--prior.name=flow", "--prior.width=32", "--prior.images=1024"]
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    succeeded(train("--run.path=whole", *options))

    for rounds, sent, code in (
        (6, signal.SIGTERM, INTERRUPTED),
        (12, signal.SIGKILL, -signal.SIGKILL),
    ):
        job = start(tmp_path, "--run.path=broken", *options)
        wait_for_rounds(job, broken, rounds)
        job.send_signal(sent)
        ends(job, code)
        assert len(losses(broken)) < 20

    again = succeeded(train("--run.path=broken", *options))
    assert "resuming from" in again.stderr + again.stdout
    assert losses(broken) == losses(whole)
    assert newest(broken).name == newest(whole).name
    assert same(weights(broken), weights(whole))


def test_the_death_of_the_launcher_stops_the_run_with_a_checkpoint(small, tmp_path):
    options = [*small, "--train.images=200000", "--run.path=run"]
    launcher = subprocess.Popen(train_command(*options), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    wait_for_rounds(launcher, tmp_path / "run", 1)
    launcher.terminate()
    launcher.wait(timeout=60)
    with FileLock(tmp_path / "run/.lock", timeout=60):  # free: the training process has left
        last = newest(tmp_path / "run")
    assert json.loads((last / "trainer.json").read_text())["round"] < 200


def test_a_kill_in_the_middle_of_a_checkpoint_costs_only_what_came_after_the_one_before(train, small, tmp_path):
    options = [*small, "--train.images=2048", "--checkpoint.rounds=2", "--run.path=run"]
    job = start(tmp_path, *options)
    checkpoints = tmp_path / "run/checkpoints"
    # Kill the moment the third checkpoint's folder appears: it is being written, its manifest cannot be there yet.
    while job.poll() is None and len(list(checkpoints.glob("step-*"))) < 3:
        pass
    job.kill()
    ends(job, -signal.SIGKILL)
    assert not (checkpoints / "step-00000048/manifest.json").exists()
    done = succeeded(train(*options))
    assert "resuming from run/checkpoints/step-00000032" in done.stderr + done.stdout
    assert len(losses(tmp_path / "run")) == 8
    assert sorted(os.listdir(checkpoints)) == ["step-00000048", "step-00000064"]


def test_a_finished_run_is_left_as_it_is(train, small, tmp_path):
    options = [*small, "--train.images=512", "--run.path=run"]
    succeeded(train(*options))
    config = tmp_path / "run/config.yaml"
    recorded = config.read_text()
    time = config.stat().st_mtime_ns
    again = succeeded(train(*options, "--report.pictures=3"))
    assert "nothing left to do" in again.stderr + again.stdout
    assert config.read_text() == recorded and config.stat().st_mtime_ns == time
