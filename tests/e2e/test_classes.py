"""Runs whose prior is conditioned on the labels of the data, from training to samples of a class."""

from dataclasses import replace

import pytest
import torch

from naign.data.format.writer import pack
from naign.data.sources.catalog import load
from naign.data.sources.source import Made
from naign.model.naign import NAIGN
from tests.conftest import SMALL
from tests.e2e.runs import metrics_of, same, weights
from tests.programs import refused, succeeded

pytestmark = pytest.mark.slow

BASE = [*SMALL, "--objective.imle=0", "--objective.denoising=1", "--prior.images=1024"]
FLOW = [*BASE, "--prior.name=flow", "--prior.width=32", "--prior.depth=1", "--prior.batch=64", "--prior.passes=2"]
PRIORS = {
    "flow": [*FLOW, "--prior.classes", "--prior.guidance=0.5"],
    "gmm": [*BASE, "--prior.name=gmm", "--prior.classes", "--prior.components=12"],
}


@pytest.mark.parametrize("name", list(PRIORS))
def test_from_labels_to_samples_on_ranks_and_after_a_stop(train, train_thrice, naign, digits, tmp_path, name):
    options = [f"--data.path={digits}", *PRIORS[name], "--train.images=2048", "--report.pictures=8"]
    train_thrice(*options)
    whole = weights(tmp_path / "run")
    ranks = weights(tmp_path / "ranks")
    assert same(whole, weights(tmp_path / "stopped"))
    assert torch.equal(whole["prior.class_counts"], ranks["prior.class_counts"])
    assert name == "flow" or torch.equal(whole["prior.owners"], ranks["prior.owners"])
    model = NAIGN.from_pretrained(tmp_path / "run")
    assert model.labels == tuple("0123456789")
    assert int(model.prior.class_counts.sum()) == 1024

    succeeded(naign("sample run --label 3 --n 4 --to three.png"))
    succeeded(naign("evaluate run --samples 300"))
    made = tmp_path / "run/evaluation"
    assert 0 <= metrics_of(tmp_path / "run")["asked"]["share"] <= 1
    assert (made / "classes.png").exists()
    assert "of the class that they were drawn from" in (made / "report.html").read_text()
    guided = naign("export run --guidance 2 --to guided")
    if name == "gmm":
        refused(guided, "guidance can be chosen for a flow of codes")
    else:
        succeeded(guided)
        assert NAIGN.from_pretrained(tmp_path / "guided").prior.config.guidance == 2
        succeeded(naign("sample guided --label 7 --n 4"))
    renamed = replace(load("digits"), labels=tuple("abcdefghij"))
    pack(renamed, str(tmp_path / "renamed"), shards=4)
    options += ["--train.images=2304", f"--data.path={tmp_path}/renamed"]
    refused(train(*options, "--run.path=run", "--resume=changed"), "are not those of")
    succeeded(train(*options, "--run.path=new", "--model.init=run"))
    assert int(NAIGN.from_pretrained(tmp_path / "new").prior.class_counts.sum()) == 1024
    refused(naign("sample run --label ten"), "no class 'ten' among its 10 classes")


def test_data_without_all_labels_are_refused(train, small, tmp_path):
    source = load("digits")

    def packed(folder, labels, every):
        """The digits with no label but for every so-many-th."""

        def make(row):
            key, image, label = source.splits["train"].make(row)
            return key, image, label if row % every else -1

        splits = {"train": Made(length=512, make=make)}
        pack(replace(source, labels=labels, splits=splits), str(tmp_path / folder), shards=4)
        return str(tmp_path / folder)

    bare = packed("bare", (), 1)
    classes = [*FLOW, "--prior.classes", "--train.images=512"]
    refused(train(f"--data.path={bare}", *classes, "--run.path=run"), "the data set has no labels")
    assert not (tmp_path / "run").exists()
    done = train(f"--data.path={packed('some', source.labels, 64)}", *classes, "--run.path=some-run", ranks=2)
    assert done.returncode
    assert "more samples of a round have no label" in done.stderr
    options = [*small, "--objective.imle=0"]
    refused(train(*options, "--prior.classes", "--run.path=run"), "--prior.classes")
    assert not (tmp_path / "run").exists()
