"""Quality that is measured while a run trains."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from naign.config import parse
from naign.data.loader import Stream
from naign.errors import InputError
from naign.training.quality import Quality
from tests.conftest import SMALL
from tests.e2e.runs import reports
from tests.programs import succeeded

EVERY = ["--quality.rounds=2"]
STILL = ["--train.lr=1e-9", "--train.lr_end=1e-9"]


def open_quality(stream, options):
    return Quality(parse(options), stream, Accelerator(cpu=True))


def measured(run):
    """quality/* of each measurement, without the seconds."""
    found = []
    for line in reports(run):
        values = {name.removeprefix("quality/"): value for name, value in line.items() if "quality/" in name}
        if values:
            assert values.pop("seconds") > 0
            found.append(values)
    return found


@pytest.mark.slow
def test_samples_of_noise_and_of_the_prior_are_measured_and_it_changes_nothing(train, small, tmp_path):
    options = [*small, "--prior.name=gmm", "--prior.components=3", "--train.images=1024"]
    succeeded(train(*options, *EVERY, "--run.path=measured"))
    second, fourth, prior = measured(tmp_path / "measured")
    assert second.keys() == fourth.keys() > prior.keys()
    assert prior.keys() == {"fd", "recall", "precision", "idempotence"}
    assert {"repair_blur", "repair_noise", "repair_salt_pepper", "repair_rows"} <= fourth.keys()
    assert prior["fd"] != fourth["fd"]

    succeeded(train(*options, "--run.path=plain"))
    for ours, theirs in zip(reports(tmp_path / "measured"), reports(tmp_path / "plain"), strict=True):
        for name, value in theirs.items():
            assert not name.startswith(("loss/", "prior/")) or ours[name] == value, name


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(train, small, tmp_path):
    options = [*small, *EVERY, *STILL, "--train.images=512"]
    for ranks in (1, 2):
        succeeded(train(*options, f"--run.path={ranks}", ranks=ranks))
    (one,) = measured(tmp_path / "1")
    (two,) = measured(tmp_path / "2")
    for name in ("fd", "recall", "precision", "idempotence"):  # repairs are those of each rank's own images
        assert two[name] == pytest.approx(one[name], rel=1e-3)


@pytest.mark.slow
def test_pooled_pixels_are_warned_of_unless_they_are_asked_for(points, tmp_path, caplog):
    given = ["--quality.rounds=2", f"--data.path={points}", f"--run.path={tmp_path}", "--model.name=mlp"]
    given += ["--latents.name=gaussian", "--prior.name=none"]
    with Stream(parse(given).data, seed=0, round_size=256) as stream:
        assert open_quality(stream, [*given, "--quality.encoder=pixels"]).encoder.name == "pixels"
        assert "pooled pixels" not in caplog.text
        open_quality(stream, given)
        assert "measured on pooled pixels" in caplog.text
        with pytest.raises(InputError, match="quality.encoder 'digits-cnn64' reads"):
            open_quality(stream, [*given, "--quality.encoder=digits-cnn64"])


def test_features_that_are_not_finite_are_no_measurement_and_the_rest_is_json(digits, tmp_path):
    given = ["--quality.rounds=2", f"--data.path={digits}", f"--run.path={tmp_path}", *SMALL]
    with Stream(parse(given).data, seed=0, round_size=256) as stream:
        quality = open_quality(stream, given)
        broken = SimpleNamespace(exported=lambda part, x: x * math.inf)
        images = torch.zeros(20, *stream.shape)
        values = quality.measure(broken, lambda ids: torch.ones(len(ids), *stream.shape), images)
        assert "quality/fd" not in values and values["quality/seconds"] > 0
        json.dumps(values, allow_nan=False)


@pytest.mark.slow
def test_it_goes_with_a_crop(train, small, tmp_path):
    options = [*small, *EVERY, "--data.crop=4", "--objective.damage=noise", "--run.path=run"]
    succeeded(train(*options, "--train.images=512"))
    assert len(measured(tmp_path / "run")) == 1
