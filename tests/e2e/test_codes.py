"""Runs with a prior of codes, a flow or a mixture: from training in two stages to samples of both kinds."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import INTERRUPTED
from naign.model.naign import NAIGN
from naign.model.prior.features import KEPT, TABLE
from naign.model.prior.mixture import ITERATIONS
from naign.philox import LEARN, normal
from tests.conftest import SMALL
from tests.e2e.runs import newest, reports, same, weights
from tests.programs import execute, refused, succeeded

pytestmark = pytest.mark.slow

CODES = ["--prior.name=flow", "--prior.width=32", "--prior.batch=64", "--prior.passes=2", "--prior.images=1024"]
MIXTURE = ["--prior.name=gmm", "--prior.components=3"]


@pytest.mark.parametrize(("network", "size"), [("conv", 16), ("spatial", 2)])
def test_from_training_to_samples_of_either_law(train, naign, small, tmp_path, network, size):
    run = tmp_path / "run"
    options = [
        *small,
        *CODES,
        f"--model.name={network}",
        f"--model.code={size}",
        "--prior.depth=1",
        "--prior.guidance=1",
        "--run.path=run",
        "--train.images=2048",
        "--checkpoint.rounds=4",
        "--checkpoint.keep=0",
    ]
    succeeded(train(*options))

    lines = reports(run)
    first = [line for line in lines if line["train/stage"] == 1]
    assert len(first) == 8
    for number, line in enumerate(first):
        assert (line["round"], line["images_seen"], line["codes_seen"]) == (number, 256 * (number + 1), 0)
        assert "loss/total" in line and "match/distance" in line
    last = lines[-1]
    assert (last["train/stage"], last["images_seen"], last["codes_seen"]) == (2, 2048, 2 * 1024)
    assert last["prior/fitted"] == 1 and last["prior/loss"] > 0
    assert last["seconds/training"] > first[-1]["seconds/training"]
    assert last["step"] == 64 + 32 + 1, "steps of f, of the flow, and the end"
    early = load_file(run / "checkpoints/step-00000032/model.safetensors")
    half = load_file(run / "checkpoints/step-00000064/model.safetensors")
    whole = weights(run)
    for name, value in half.items():
        changed = not torch.equal(value, whole[name])
        assert changed == name.startswith("prior."), name
        assert not name.startswith("encoder.") or not torch.equal(value, early[name])

    model = NAIGN.from_pretrained(run)
    four = model.sample(4)
    assert not torch.equal(model.sample(4, latents="noise"), four)
    torch.testing.assert_close(model.sample(6)[:4], four)
    for to in (newest(run), run):
        refused(naign(f"export run --to {to}"), "holds more than an export")
    succeeded(naign("export run --to whole"))
    succeeded(naign("evaluate whole --samples 300"))
    succeeded(naign("export run --steps 3 --to finer"))
    finer = NAIGN.from_pretrained(tmp_path / "finer").prior
    assert finer.config.steps == 3
    ids = torch.arange(64)
    assert not torch.equal(finer.draw(0, 0, ids, "cpu"), model.prior.draw(0, 0, ids, "cpu"))
    refused(naign("sample run --steps 0"), "prior.steps is 0")


def test_mirror_images_have_the_same_features(train, small, digits, tmp_path):
    options = [*small, *CODES, "--model.name=spatial", "--model.code=2", "--prior.depth=1", "--prior.features=0.7"]
    succeeded(train(*options, "--data.flip", "--run.path=run", "--train.images=512"))
    model = NAIGN.from_pretrained(tmp_path / "run")
    flow = model.prior
    images = scaled(read_split(str(digits), "train")[0])
    with torch.no_grad():
        views = [flow.whiten(model.network.encode(each)) for each in (images, images.flip(-1))]
    noise = normal(0, TABLE, torch.arange(KEPT), (flow.features.size,), "cpu", stream=LEARN)
    drawn = (flow.features.table - 0.7 * noise)[::64]  # what samples draw, without its noise
    assert torch.cdist(drawn, flow.features(*views)).amin(1).max() < 0.1
    assert torch.cdist(drawn, flow.features(views[0])).amin(1).median() > 1


def test_a_mixture_of_the_codes_on_ranks_and_after_a_stop(train, train_thrice, naign, digits, small, tmp_path):
    options = [*small, *MIXTURE, "--train.images=2048"]
    train_thrice(*options)
    found = {run: NAIGN.from_pretrained(tmp_path / run) for run in ("run", "ranks", "stopped")}
    prior = found["run"].prior
    assert prior.weights.shape == (3,) and float(prior.weights.min()) > 0
    assert same(prior.state_dict(), found["stopped"].prior.state_dict())
    images = scaled(read_split(str(digits), "train")[0])
    for run, model in found.items():
        codes = model.network.encode(images).detach()
        prior = model.prior
        apart = prior.weights @ prior.means @ prior.back + prior.mean - codes.mean(0)
        assert float((apart / codes.std(0).mean()).abs().max()) < 0.15, run
        unlike = model.score(images).rank > 0.95
        assert 0.02 < float(unlike.float().mean()) < 0.08, run
        assert float((model.score(torch.rand_like(images)).rank > 0.95).float().mean()) > 0.9, run
        assert float(model.bank.distances.min()) > 0, "the nearest code is another one's"
        assert len(model.bank.codes) == len(model.bank.codes.unique(dim=0)) <= len(images)
    apart = found["run"].bank.distances - found["ranks"].bank.distances
    assert float(apart.abs().mean()) < 0.1 * float(found["run"].bank.distances.mean())
    succeeded(naign("evaluate run --samples 300"))
    done = train(*options, "--prior.components=5000", "--run.path=large")
    assert done.returncode == 2 and "ask for fewer" in done.stderr.lower()
    assert not (tmp_path / "large").exists()


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


@pytest.mark.parametrize("after", [0, 3, ITERATIONS - 1])
def test_a_stop_within_the_fit_of_the_prior(train, small, tmp_path, after):
    options = [*small, *MIXTURE, "--train.images=512"]
    command = [sys.executable, "-c", STOP.format(after=after), *options, "--run.path=run"]
    stopped = execute(command, tmp_path)
    assert stopped.returncode == INTERRUPTED and "the same command goes on from step-" in stopped.stdout, stopped.stderr
    for path in ("run", "whole"):
        succeeded(train(*options, f"--run.path={path}"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_larger_budget_fits_the_prior_anew(train, small, tmp_path):
    options = [*small, *MIXTURE, "--run.path=run"]
    succeeded(train(*options, "--train.images=512"))
    succeeded(train(*options, "--train.images=1024", "--resume=changed"))
    last = reports(tmp_path / "run")[-1]
    assert last["images_seen"] > 512 and last["train/stage"] == 2


def test_networks_without_a_code_are_refused(train, naign, digits, tmp_path):
    points = [option for option in SMALL if not option.startswith("--model.code")]
    points += [f"--data.path={digits}", "--model.name=mlp", "--train.images=256", "--run.path=run"]
    refused(train(*points, "--prior.name=flow"), "this network has no code")
    assert not (tmp_path / "run").exists()
    succeeded(train(*points, "--latents.name=gaussian"))
