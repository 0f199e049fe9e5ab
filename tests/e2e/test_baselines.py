"""The networks of the baselines package as the programs train, resume, export, sample and measure them."""

import shutil
import sys

import pytest
import torch

from naign.model.naign import NAIGN
from tests.conftest import SMALL, direct_command
from tests.e2e.runs import losses, metrics_of, same, weights
from tests.programs import execute, succeeded

pytestmark = pytest.mark.slow

SMALLER = [option for option in SMALL if "imle" not in option]
OPTIONS = {
    "vae": [*SMALLER, "--model.name=vae", "--objective.name=vae", "--prior.name=code-normal"],
    "rectified_flow": [
        *(option for option in SMALLER if "code" not in option),
        "--model.name=rectified_flow",
        "--model.depth=1",
        "--model.evaluations=2",
        "--objective.name=rectified_flow",
        "--latents.name=gaussian",
        "--train.lr=5e-3",
    ],
}
ENERGIES = {  # whose losses do not fall: they are differences of energies
    "ebm": [
        *(option for option in SMALLER if "code" not in option),
        "--model.name=ebm",
        "--model.chains=64",
        "--model.steps=3",
        "--objective.name=ebm",
        "--train.optimizer=ebm_adam",
    ],
    "nae": [
        *SMALLER,
        "--objective.name=nae",
        "--objective.code-steps=2",
        "--objective.steps=2",
    ],
}
ALL = OPTIONS | ENERGIES
BOTH = pytest.mark.parametrize("name", OPTIONS)
SHORT = "--train.images=1024"  # 4 rounds


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A folder with a run of 16 rounds of each."""
    folder = tmp_path_factory.mktemp("baselines")
    more = ["--train.images=4096", "--report.pictures=4", f"--data.path={digits}"]
    for name, options in OPTIONS.items():
        succeeded(execute(direct_command(f"--run.path={name}", *options, *more), folder))
    return folder


@BOTH
def test_it_trains_with_falling_loss_and_samples_by_seed(naign, trained, tmp_path, name):
    found = losses(trained / name)
    assert len(found) == 16 and found[-1]["loss/total"] < found[0]["loss/total"] - 0.1
    succeeded(naign(f"export {trained}/{name} --to one"))
    one = NAIGN.from_pretrained(tmp_path / "one")
    made = one.sample(6, seed=3)
    assert torch.equal(made, NAIGN.from_pretrained(trained / name).sample(6, seed=3))
    assert not torch.equal(made, one.sample(6, seed=4))
    torch.testing.assert_close(made[:2], one.sample(2, seed=3))
    succeeded(naign("sample one --n 4 --to a.png"))


@pytest.mark.parametrize("name", ALL)
def test_it_resumes_bit_for_bit(train, digits, tmp_path, name):
    options = [f"--data.path={digits}", *ALL[name], "--train.warmup=0", "--train.lr=1e-3", "--train.lr_end=1e-3"]
    succeeded(train(*options, "--run.path=whole", SHORT))
    succeeded(train(*options, "--run.path=parts", "--train.images=512"))
    succeeded(train(*options, "--run.path=parts", SHORT, "--resume=changed"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@BOTH
def test_two_ranks_learn_what_one_learns(train, digits, tmp_path, name):
    for ranks in (1, 2):
        succeeded(train(f"--data.path={digits}", *OPTIONS[name], SHORT, f"--run.path=ranks-{ranks}", ranks=ranks))
    for two, one in zip(losses(tmp_path / "ranks-2"), losses(tmp_path / "ranks-1"), strict=True):
        assert two["loss/total"] == pytest.approx(one["loss/total"], rel=0.1, abs=0.02)


def test_decoded_latents_are_measured_as_samples(naign, trained, tmp_path):
    shutil.copytree(trained / "vae", tmp_path / "run")
    succeeded(naign("evaluate run --samples 300"))
    found = metrics_of(tmp_path / "run")
    coverage = found["coverage"]
    sampling = found["sampling"]
    assert found["fd"]["latents"] > 0 and found["fd"]["latents_ratio"] > 1
    assert coverage["latents"].keys() == coverage["train"].keys() and found["restoration"]
    assert 0 < sampling["latents_cpu_seconds"] < sampling["cpu_seconds"]
    assert "z, decoded" in (tmp_path / "run/evaluation/report.html").read_text()


def test_a_flow_takes_another_number_of_evaluations(naign, trained, tmp_path):
    shutil.copytree(trained / "rectified_flow", tmp_path / "run")

    def solve(line):
        return execute([sys.executable, "-m", "naign_baselines.solver", "run", *line.split()], tmp_path)

    assert "model.evaluations is 0" in solve("--evaluations 0 --to none").stderr
    assert not (tmp_path / "none").exists()
    succeeded(solve("--evaluations 3 --to three"))
    assert NAIGN.from_pretrained(tmp_path / "three").metadata["model"]["evaluations"] == 3
    succeeded(naign("evaluate three --samples 300"))
    found = metrics_of(tmp_path / "three")
    assert found["fd"]["latents"] is None and found["restoration"] is None
    assert found["sampling"]["samples"] == 300 and any("repairs none" in note for note in found["notes"])
