"""Quality that is measured while a run trains, and the checkpoint that it keeps."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from naign.checkpoint.writer import is_complete
from naign.config import parse
from naign.data.loader import Stream
from naign.errors import InputError
from naign.settings.budget import measured_by
from naign.training.quality import Quality
from tests.conftest import SMALL

EVERY = ["--quality.rounds=2", "--quality.samples=200"]
STILL = ["--train.lr=1e-9", "--train.lr_end=1e-9"]


def open_quality(stream: Stream, options: list[str]) -> Quality:
    config = parse(options)
    quality = Quality(config, stream, Accelerator(cpu=True))
    quality.restore_best(config.run.path, 10)
    return quality


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
    assert "done (ended by quality.patience): the run lies in" in done.stdout
    again = train(*options)
    assert again.returncode == 0 and len(lines(tmp_path / "run")) == rounds
    assert "nothing left to do" in again.stdout + again.stderr

    # A fresh machine knows as much, and keeps the best checkpoint in the bucket.
    shutil.rmtree(tmp_path / "run")
    fresh = train(*options)
    assert fresh.returncode == 0 and "nothing left to do" in fresh.stdout + fresh.stderr
    best = json.loads((tmp_path / "run/best.json").read_text())
    assert is_complete(tmp_path / "remote/checkpoints" / best["checkpoint"])


def test_a_distance_measured_otherwise_is_not_compared_with(digits, tmp_path, caplog):
    """A run that goes on with fewer samples, another split or encoder begins anew, and so does its patience."""
    done = ["--quality.rounds=2", "--quality.patience=3", f"--data.path={digits}", f"--run.path={tmp_path}"]
    with Stream(parse(done).data, seed=0, round_size=256, prefetch=False) as stream:
        first = open_quality(stream, done)
        first.best = {"fd": 0.1, "encoder": first.encoder.name, "round": 4, "measured": measured_by(first.settings)}
        assert [first.exhausted(rounds) for rounds in (4, 8, 10)] == [False, False, True]
        (tmp_path / "best.json").write_text(first.record("step-00000032"))
        assert open_quality(stream, done).exhausted(10) and not caplog.text
        for changed in ("--quality.samples=100", "--quality.split=test", "--quality.encoder=pixels"):
            other = open_quality(stream, [*done, changed])
            assert other.best == {} and not other.exhausted(100), changed
            assert "was measured otherwise" in caplog.text
            caplog.clear()
        for damage in ({"fd": math.nan}, {"fd": "0.1"}, {"round": 11}):
            (tmp_path / "best.json").write_text(json.dumps(first.best | damage))
            assert open_quality(stream, done).best == {} and "the next measurement counts as the best" in caplog.text
            caplog.clear()


@pytest.mark.slow
def test_pooled_pixels_are_warned_of_unless_they_are_asked_for(points, tmp_path, caplog):
    given = ["--quality.rounds=2", f"--data.path={points}", f"--run.path={tmp_path}", "--model.name=mlp"]
    with Stream(parse(given).data, seed=0, round_size=256, prefetch=False) as stream:
        assert open_quality(stream, [*given, "--quality.encoder=pixels"]).encoder.name == "pixels"
        assert "pooled pixels" not in caplog.text
        open_quality(stream, given)
        assert "measured on pooled pixels" in caplog.text
        with pytest.raises(InputError, match="quality.encoder 'digits-cnn64' reads"):
            open_quality(stream, [*given, "--quality.encoder=digits-cnn64"])


def test_features_that_are_not_finite_are_no_measurement_and_the_rest_is_json(digits, tmp_path):
    given = ["--quality.rounds=2", "--quality.samples=20", f"--data.path={digits}", f"--run.path={tmp_path}", *SMALL]
    with Stream(parse(given).data, seed=0, round_size=256, prefetch=False) as stream:
        quality = open_quality(stream, given)
        broken = SimpleNamespace(exported=lambda part, x: x * math.inf)
        images = torch.zeros(20, *stream.shape)
        values, better = quality.measure(broken, lambda ids: torch.ones(len(ids), *stream.shape), images, rounds=2)
        assert not better and quality.best == {} and "quality/fd" not in values and values["quality/seconds"] > 0
        json.dumps(values, allow_nan=False)


@pytest.mark.slow
def test_a_split_that_is_not_there_is_refused(train, digits):
    done = train(f"--data.path={digits}", *SMALL, *EVERY, "--quality.split=val", "--run.path=run")
    assert done.returncode == 2 and "val" in done.stderr


@pytest.mark.slow
def test_it_goes_with_a_crop_and_a_damaged_record(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, *EVERY, "--data.crop=4", "--objective.damage=noise", "--run.path=run"]
    assert train(*options, "--train.images=512").returncode == 0
    assert list(measured(tmp_path / "run")) == [1]
    (tmp_path / "run/best.json").write_text("{x")
    done = train(*options, "--train.images=1024", "--resume=changed")
    assert done.returncode == 0 and "says nothing of the best checkpoint" in done.stderr
    assert json.loads((tmp_path / "run/best.json").read_text())["round"] > 2
    done = train(*options, "--run.path=other", "--quality.split=nope", "--train.images=512")
    assert done.returncode == 2 and "nope" in done.stderr and not (tmp_path / "other").exists()
