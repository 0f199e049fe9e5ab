"""Quality that is measured while a run trains, and the checkpoint that it keeps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.writer import is_complete
from pipeline.config import QualityConfig
from pipeline.training.quality import Quality
from tests.conftest import SMALL

EVERY = ["--quality.rounds=2", "--quality.samples=200"]
STILL = ["--train.lr=1e-9", "--train.lr_end=1e-9"]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run: Path) -> dict[int, dict[str, float]]:
    """quality/* by round, without the seconds."""
    found = {}
    for line in lines(run):
        if "quality/fd" in line:
            values = {name.removeprefix("quality/"): value for name, value in line.items() if "quality/" in name}
            assert values.pop("seconds") > 0
            found[line["round"]] = values
    return found


@pytest.mark.slow
def test_it_changes_nothing_and_the_best_checkpoint_is_kept(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, *EVERY, "--checkpoint.keep=1", "--checkpoint.rounds=100"]
    done = train(*options, "--run.path=whole", "--train.images=2048")
    assert done.returncode == 0, done.stderr
    whole = measured(tmp_path / "whole")
    assert list(whole) == [1, 3, 5, 7]
    assert set(whole[1]) == {"fd", "recall", "precision", "idempotence", "repair_blur", "repair_noise"} | {
        "repair_salt_pepper",
        "repair_rows",
    }
    best = json.loads((tmp_path / "whole/best.json").read_text())
    assert best["fd"] == min(values["fd"] for values in whole.values()) and best["encoder"] == "digits-cnn64"
    assert is_complete(tmp_path / "whole/checkpoints" / best["checkpoint"])
    assert len(list((tmp_path / "whole/checkpoints").iterdir())) <= 2

    # What is measured changes nothing: the same losses as without.
    plain = [option for option in options if not option.startswith("--quality")]
    assert train(*plain, "--run.path=plain", "--train.images=2048").returncode == 0
    names = [name for name in lines(tmp_path / "plain")[-1] if name.startswith("loss/")]
    assert [[line[name] for name in names] for line in lines(tmp_path / "plain")] == [
        [line[name] for name in names] for line in lines(tmp_path / "whole")
    ]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, *EVERY, *STILL, "--train.images=512"]
    for ranks in (1, 2):
        done = train(*options, f"--run.path={ranks}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (measured(tmp_path / str(ranks))[1] for ranks in (1, 2))
    for name in ("fd", "recall", "precision", "idempotence"):  # repairs are those of each rank's own images
        assert two[name] == pytest.approx(one[name], rel=1e-3)


@pytest.mark.slow
def test_patience_ends_a_run_for_good(train, digits, tmp_path):
    options = [
        f"--data.path={digits}",
        *SMALL,
        *EVERY,
        "--quality.patience=1",
        "--train.lr=1e-9",
        "--train.lr_end=1e-9",
    ]
    options += ["--train.images=25600", "--train.ema=0.0", "--run.path=run", f"--run.remote={tmp_path}/remote"]
    options += ["--checkpoint.keep=1"]
    done = train(*options)
    assert done.returncode == 0, done.stderr
    rounds = len(lines(tmp_path / "run"))
    assert rounds < 100 and "no better than in round" in done.stdout + done.stderr
    again = train(*options)
    assert again.returncode == 0 and len(lines(tmp_path / "run")) == rounds
    assert "nothing left to do" in again.stdout + again.stderr

    # A fresh machine knows as much, and keeps the best checkpoint in the bucket.
    shutil.rmtree(tmp_path / "run")
    fresh = train(*options)
    assert fresh.returncode == 0 and "nothing left to do" in fresh.stdout + fresh.stderr
    best = json.loads((tmp_path / "run/best.json").read_text())
    assert is_complete(tmp_path / "remote/checkpoints" / best["checkpoint"])


def test_patience_begins_with_the_first_measurement():
    quality = Quality.__new__(Quality)
    quality.config, quality.round = QualityConfig(rounds=2, patience=3), 0
    assert not quality.exhausted(100)
    quality.round = 4
    assert [quality.exhausted(rounds) for rounds in (4, 8, 10)] == [False, False, True]


@pytest.mark.slow
def test_a_split_that_is_not_there_is_refused(train, digits):
    done = train(f"--data.path={digits}", *SMALL, *EVERY, "--quality.split=val", "--run.path=run")
    assert done.returncode == 2 and "val" in done.stderr


@pytest.mark.slow
def test_it_goes_with_a_crop_and_a_damaged_record(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, *EVERY, "--data.crop=4", "--run.path=run"]
    assert train(*options, "--train.images=512").returncode == 0
    assert list(measured(tmp_path / "run")) == [1]
    (tmp_path / "run/best.json").write_text("{x")
    done = train(*options, "--train.images=1024", "--resume=changed")
    assert done.returncode == 0 and "says nothing of the best checkpoint" in done.stderr
    assert json.loads((tmp_path / "run/best.json").read_text())["round"] > 2
    done = train(*options, "--run.path=other", "--quality.split=nope", "--train.images=512")
    assert done.returncode == 2 and "nope" in done.stderr and not (tmp_path / "other").exists()
