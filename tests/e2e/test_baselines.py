"""The VAE and the rectified flow as the programs train, resume, export, sample and measure them."""

import json
import subprocess
import sys

import pytest
import torch

from naign.model.naign import NAIGN
from tests.conftest import SMALL, forked
from tests.e2e.runs import losses, weights

SMALLER = [option for option in SMALL if "imle" not in option]
VAE = [*SMALLER, "--model.name=vae", "--objective.name=vae", "--prior.name=code-normal"]
FLOW = [option for option in SMALLER if "code" not in option] + ["--model.depth=1", "--latents.name=gaussian"]
FLOW += ["--model.name=rectified_flow", "--objective.name=rectified_flow", "--train.lr=5e-3"]
FLOW += ["--model.evaluations=2"]
BOTH = pytest.mark.parametrize("options", [VAE, FLOW], ids=["vae", "rectified_flow"])
LONG, SHORT = "--train.images=4096", "--train.images=1024"  # 16 and 4 rounds


@pytest.mark.slow
@BOTH
def test_it_trains_with_falling_loss_and_samples_by_seed(train, naign, digits, tmp_path, options):
    done = train(f"--data.path={digits}", *options, "--run.path=run", LONG, "--report.pictures=4", "--quality.rounds=8")
    assert done.returncode == 0, done.stderr
    found = [line["loss/total"] for line in losses(tmp_path / "run")]
    assert len(found) == 16 and found[-1] < found[0] - 0.1
    assert naign("export", "run", "--to", "one").returncode == 0
    one, run = (NAIGN.from_pretrained(tmp_path / name) for name in ("one", "run"))
    assert torch.equal(one.sample(6, seed=3), run.sample(6, seed=3))
    assert not torch.equal(one.sample(6, seed=3), one.sample(6, seed=4))
    torch.testing.assert_close(one.sample(6, seed=3)[:2], one.sample(2, seed=3))
    assert naign("sample", "one", "--n", "4", "--to", "a.png").returncode == 0


@pytest.mark.slow
@BOTH
def test_it_resumes_bit_for_bit(train, digits, tmp_path, options):
    same = [f"--data.path={digits}", *options, "--train.warmup=0", "--train.lr=1e-3", "--train.lr_end=1e-3"]
    assert train(*same, "--run.path=whole", SHORT).returncode == 0
    assert train(*same, "--run.path=parts", "--train.images=512").returncode == 0
    done = train(*same, "--run.path=parts", SHORT, "--resume=changed")
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
@BOTH
def test_two_ranks_learn_what_one_learns(train, digits, tmp_path, options):
    for ranks in (1, 2):
        given = [f"--data.path={digits}", *options, SHORT, f"--run.path=ranks-{ranks}"]
        done = train(*given, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (losses(tmp_path / f"ranks-{ranks}") for ranks in (1, 2))
    assert two == pytest.approx(one, rel=0.1, abs=0.02)  # steps are of other images, in the same rounds


@pytest.mark.slow
def test_decoded_latents_are_measured_as_samples_and_a_mixture_may_take_their_place(train, naign, digits, tmp_path):
    assert train(f"--data.path={digits}", *VAE, "--run.path=run", LONG).returncode == 0
    done = naign("export", "run", "--prior", "gmm", "--components", "3", "--to", "mixture")
    assert done.returncode == 0, done.stderr
    for name in ("run", "mixture"):
        done = naign("evaluate", name, "--samples", "300")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / name / "evaluation/metrics.json").read_text())
        assert found["fd"]["latents"] > 0 and found["fd"]["latents_ratio"] > 1
        assert found["coverage"]["latents"].keys() == found["coverage"]["train"].keys() and found["restoration"]
        assert 0 < found["sampling"]["latents_cpu_seconds"] < found["sampling"]["cpu_seconds"]
        assert "z, decoded" in (tmp_path / name / "evaluation/report.html").read_text()


@pytest.mark.slow
def test_a_flow_takes_another_number_of_evaluations(train, naign, digits, tmp_path):
    assert train(f"--data.path={digits}", *FLOW, "--run.path=run", LONG, "--train.ema=0.9").returncode == 0

    def solve(*given: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "naign_baselines.solver", "run", *given]
        return subprocess.run(command, cwd=tmp_path, env=forked(), capture_output=True, text=True, check=False)

    assert "model.evaluations is 0" in solve("--evaluations", "0", "--to", "none").stderr
    assert not (tmp_path / "none").exists()
    done = solve("--evaluations", "3", "--to", "three")
    assert done.returncode == 0, done.stderr
    assert NAIGN.from_pretrained(tmp_path / "three").metadata["model"]["evaluations"] == 3
    done = naign("evaluate", "three", "--samples", "300")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "three/evaluation/metrics.json").read_text())
    assert found["fd"]["latents"] is None and found["restoration"] is found["density"] is None
    assert found["sampling"]["samples"] == 300 and any("repairs none" in note for note in found["notes"])
