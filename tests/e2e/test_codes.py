"""Runs with a prior of codes, a flow or a mixture: from training in two stages to samples of both kinds."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from naign.checkpoint.writer import newest_checkpoint
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import INTERRUPTED
from naign.model.naign import NAIGN
from tests.conftest import SMALL
from tests.e2e.runs import reports
from tests.programs import execute, refused, succeeded

pytestmark = pytest.mark.slow

CODES = ["--prior.name=flow", "--prior.width=32", "--prior.batch=64", "--prior.passes=2", "--prior.images=1024"]


@pytest.mark.parametrize("network", ["conv", "spatial"])
def test_from_training_to_samples_of_either_law(train, naign, digits, tmp_path, network):
    size = "--model.code=2" if network == "spatial" else "--model.code=16"
    options = [f"--data.path={digits}", *SMALL, *CODES, f"--model.name={network}", size, "--prior.depth=1"]
    options += ["--prior.student=256", "--prior.autoguidance=1"]
    succeeded(train(*options, "--run.path=run", "--train.images=2048", "--checkpoint.rounds=4", "--checkpoint.keep=0"))

    lines = reports(tmp_path / "run")
    first = [line for line in lines if line["train/stage"] == 1]
    assert [(line["round"], line["images_seen"], line["codes_seen"]) for line in first] == [
        (number, 256 * (number + 1), 0) for number in range(8)
    ]
    assert all("loss/total" in line and "match/distance" in line for line in first)
    last = lines[-1]
    assert (last["train/stage"], last["images_seen"], last["codes_seen"]) == (2, 2048, 1024)
    assert last["prior/fitted"] == 1 and last["prior/student"] > 0
    assert last["seconds/training"] > first[-1]["seconds/training"]
    assert last["step"] == 64 + 32 + 8 + 1, "steps of f, of the flow, of its student, and the end"
    early, half, whole = (
        load_file(tmp_path / f"run/checkpoints/step-{step:08d}/model.safetensors") for step in (32, 64, last["step"])
    )
    for name, value in half.items():
        changed = not torch.equal(value, whole[name])
        assert changed == name.startswith("prior."), name
    assert all(not torch.equal(value, half[name]) for name, value in early.items() if name.startswith("encoder."))
    noise = NAIGN.from_pretrained(tmp_path / "run").sample(4, latents="noise")
    assert not torch.equal(noise, NAIGN.from_pretrained(tmp_path / "run").sample(4))

    made = NAIGN.from_pretrained(tmp_path / "run").sample(6)
    again = NAIGN.from_pretrained(tmp_path / "run").sample(4)
    torch.testing.assert_close(made[:4], again)
    succeeded(naign("sample run --prior gmm --components 3 --to drawn.png"))
    succeeded(naign("export run --prior gmm --components 3 --to mixed"))
    mixed = NAIGN.from_pretrained(tmp_path / "mixed")
    trained = NAIGN.from_pretrained(tmp_path / "run").metadata["cpu_seconds"]
    assert mixed.metadata["prior"]["components"] == 3 and mixed.metadata["cpu_seconds"] > trained
    place = tmp_path / f"run/checkpoints/step-{last['step']:08d}"
    for to in (place, tmp_path / "run"):
        refused(
            naign(f"export run --prior gmm --components 3 --to {to}"),
            "is a run or a checkpoint, or in one",
        )
    torch.testing.assert_close(NAIGN.from_pretrained(tmp_path / "run").sample(4), again)
    refused(naign("export run --prior gmm --format onnx --to program"), "f alone")
    assert not (tmp_path / "program").exists()
    succeeded(naign("evaluate mixed --samples 300"))
    refused(naign("sample run --prior gmm --components 500"), "fewer than 20 codes a component")
    succeeded(naign("export run --steps 3 --to finer"))
    finer, taught = (NAIGN.from_pretrained(tmp_path / name).prior for name in ("finer", "run"))
    assert finer.config.steps == 3 and not finer.config.student
    ids = torch.arange(64)
    assert not torch.equal(finer.draw(0, 0, ids, "cpu"), taught.draw(0, 0, ids, "cpu"))
    for more, said in ((["0"], "prior.steps is 0"), (["3", "--prior", "gmm"], "are of a flow")):
        refused(naign("sample", "run", "--steps", *more), said)
    refused(naign("sample run --components 3"), "--components is of a mixture")


def test_a_mixture_of_the_codes_on_ranks_and_after_a_stop(train, train_thrice, naign, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, "--prior.name=gmm", "--prior.components=3"]
    options += ["--train.images=2048"]
    train_thrice(*options)
    found = {run: NAIGN.from_pretrained(tmp_path / run) for run in ("run", "ranks", "stopped")}
    assert found["run"].prior.weights.shape == (3,) and float(found["run"].prior.weights.min()) > 0
    for name, value in found["run"].prior.state_dict().items():
        assert torch.equal(value, found["stopped"].prior.get_buffer(name)), name
    images = scaled(read_split(str(digits), "train")[0])
    for run, model in found.items():
        codes, prior = model.network.encode(images).detach(), model.prior
        apart = prior.weights @ prior.means - codes.mean(0)
        assert float((apart / codes.std(0).mean()).abs().max()) < 0.15, run
    succeeded(naign("evaluate run --samples 300"))
    refused(naign("sample run --steps 3"), "flow of codes")
    done = train(*options, "--prior.components=5000", "--run.path=large")
    assert done.returncode == 2 and "ask for fewer" in done.stderr.lower() and not (tmp_path / "large").exists()


STOP = """
import naign.model.prior.mixture as mixture
from naign.errors import Stopped
def fit(self, codes, fit=mixture.Mixture.fit):
    for number, fitted in enumerate(fit(self, codes)):
        yield fitted
        if number == {after}:
            raise Stopped
mixture.Mixture.fit = fit
import pipeline.train
pipeline.train.main()
"""


@pytest.mark.parametrize("after", [0, 3])
def test_a_stop_within_the_fit_of_the_prior(train, digits, tmp_path, after):
    options = [f"--data.path={digits}", *SMALL, "--prior.name=gmm", "--prior.components=3", "--train.images=512"]
    command = [sys.executable, "-c", STOP.format(after=after), *options, "--run.path=run"]
    stopped = execute(command, tmp_path)
    assert stopped.returncode == INTERRUPTED and "the same command goes on from here" in stopped.stdout, stopped.stderr
    for path in ("run", "whole"):
        succeeded(train(*options, f"--run.path={path}"))
    folders = (newest_checkpoint(tmp_path / path / "checkpoints") for path in ("run", "whole"))
    resumed, whole = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_larger_budget_fits_the_prior_anew(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, "--prior.name=gmm", "--prior.components=3", "--run.path=run"]
    succeeded(train(*options, "--train.images=512"))
    succeeded(train(*options, "--train.images=1024", "--resume=changed"))
    lines = reports(tmp_path / "run")
    assert [line["train/stage"] for line in lines if line["images_seen"] > 512][-1] == 2


def test_networks_without_a_code_are_refused(train, naign, digits, tmp_path):
    points = [option for option in SMALL if not option.startswith("--model.code")]
    points += [f"--data.path={digits}", "--model.name=mlp", "--train.images=256", "--run.path=run"]
    refused(train(*points, "--prior.name=flow"), "this network has no code")
    assert not (tmp_path / "run").exists()
    succeeded(train(*points, "--latents.name=gaussian"))
    refused(naign("export run --prior gmm --to none"), "has no code")
