"""A pushed model has a card that says what its evaluation says, whose example runs, and nothing of this machine."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from naign.cli.model import export, push
from naign.evaluate.card import without_places
from naign.evaluate.recorded import fingerprint
from naign.evaluate.report import number
from naign.evaluate.run import evaluate
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, PointConfig
from naign.model.prior import MixtureConfig, build_prior
from tests.model.made import prior_state
from tests.refused import refused

TINY = ConvConfig(width=8, code=8, init="/home/someone/runs/first")


@pytest.fixture(scope="module")
def run(digits, save_untrained, tmp_path_factory):
    """An evaluated model."""
    folder = tmp_path_factory.mktemp("run")
    save_untrained(
        folder,
        data=digits,
        shape=(1, 8, 8),
        config=TINY,
        dataset="digits",
    )
    evaluate(str(folder), samples=50, progress=False)
    return str(folder)


@pytest.fixture
def copy(run, tmp_path):
    """A copy of it that may be changed, and its metrics.json."""
    place = shutil.copytree(run, tmp_path / "run")
    return place, place / "evaluation/metrics.json"


@pytest.mark.slow
def test_the_card_says_what_was_measured_and_its_example_runs(hub, run, digits):
    push(run, "me/digits", license="mit", private=True)
    files = hub.models["me/digits"]
    metrics = json.loads(Path(run, "evaluation/metrics.json").read_text())
    assert hub.private == {"me/digits"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.library_name == "naign"
    assert "under mit" in card.text
    blur = metrics["restoration"]["blur"]
    for value in (metrics["fd"]["once"], metrics["coverage"]["recall"]):
        assert f"| {number(value)} |" in card.text
    for value in (blur["once"], blur["psnr"]["once"]):
        assert f"→ {number(value)} |" in card.text
    for note in metrics["notes"]:
        assert note in card.text
    pictures = set(re.findall(r"\]\((\w+\.png)\)", card.text))
    assert len(pictures) == 7
    assert pictures | {"README.md", "config.json", "model.safetensors"} == set(files)
    for content in files.values():
        for place in (digits, run, "/home/someone"):
            assert place.encode() not in content
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    names = {}
    exec(example, names)
    assert torch.equal(names["samples"], NAIGN.from_pretrained(run).sample(16))
    assert names["energy"].shape == (16,)


def test_a_card_has_no_paths_of_encoders_and_no_nan(copy, tmp_path):
    place, file = copy
    metrics = json.loads(file.read_text())
    metrics["second"] = metrics["fd"] | {
        "encoder": "/home/some one/features.pt",
        "twice": float("nan"),
    }
    metrics["warnings"] = ["Trained with /home/someone/features.pt."]
    metrics["notes"] = ["None at s3://bucket/private/lite2.pt, 8×8."]
    file.write_text(json.dumps(metrics))
    push(str(place), "me/digits", dry_run=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "Trained with features.pt." in card.text
    assert "None at lite2.pt, 8×8." in card.text
    assert f"| features.pt | {number(metrics['fd']['once'])} |" in card.text
    for word in ("/home", "some one", "bucket", "private", "nan"):
        assert word not in card.content


def test_names_of_classes_are_no_places():
    header = {"labels": ["T-shirt/top", "Bag"], "data": "/home/someone/fashion"}
    assert without_places(header) == header | {"data": "fashion"}


def test_an_export_is_halved_and_has_a_card_of_its_measurements(run, digits, tmp_path):
    half = tmp_path / "half"
    card = tmp_path / "out/digits"
    export(run, to=half, dtype="float16")
    whole_size = Path(run, "model.safetensors").stat().st_size
    half_size = (half / "model.safetensors").stat().st_size
    assert half_size < 0.6 * whole_size
    close = NAIGN.from_pretrained(half).sample(3)
    torch.testing.assert_close(close, NAIGN.from_pretrained(run).sample(3), atol=0.01, rtol=0)
    with refused("half has no evaluation to write a model card from: run `naign evaluate"):
        push(str(half), "digits", dry_run=card)
    assert not card.exists()
    evaluate(str(half), data=digits, samples=50, progress=False)
    push(str(half), "digits", dry_run=card)
    text = (card / "README.md").read_text()
    for said in ('NAIGN.from_pretrained("digits")', "naign sample digits --n", "(float16)", "states no licence"):
        assert said in text
    assert (card / "model.safetensors").stat().st_size == pytest.approx(half_size, rel=0.1)
    export(str(half), to=tmp_path / "full", dtype="float32")
    assert torch.equal(NAIGN.from_pretrained(tmp_path / "full").sample(3), close)


def test_weights_that_float16_does_not_hold_are_refused(run, tmp_path):
    model = NAIGN.from_pretrained(run)
    next(model.network.parameters()).data.fill_(1e5)
    model.save_pretrained(tmp_path / "large")
    with refused("beyond 65504, which float16 does not hold: store it as float32"):
        export(f"{tmp_path}/large", to=tmp_path / "none", dtype="float16")
    assert not [*(tmp_path / "none").glob("*")]


def test_a_dry_run_uploads_nothing_and_needs_a_new_or_empty_folder(
    hub,
    run,
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.delenv("HF_TOKEN")
    mine = tmp_path / "mine"
    out = tmp_path / "out"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    for place in (mine, mine / "README.md"):
        with refused(f"{place} holds something already: give a new or empty folder"):
            push(run, "me/digits", dry_run=place)
    push(run, "me/digits", dry_run=out)
    assert not hub.requests
    count = len(list(out.iterdir()))
    assert capsys.readouterr().out.endswith(f"wrote {count} files to {out}/, uploaded nothing\n")
    expected = NAIGN.from_pretrained(run).sample(3)
    assert torch.equal(NAIGN.from_pretrained(out).sample(3), expected)
    with refused("needs a login"):
        push(run, "me/digits")


def test_points_have_a_card(points, save_untrained, tmp_path):
    """And say what the model learned, not what it was measured on."""
    config = PointConfig(name="mlp", width=8)
    folder = save_untrained(
        tmp_path / "run",
        data=None,
        shape=(2,),
        config=config,
        dataset="mnist",
    )
    evaluate(folder, data=points, samples=50, progress=False)
    push(folder, "me/points", dry_run=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.pipeline_tag is None
    assert "trained on\n[mnist](https://huggingface.co/datasets/ylecun/mnist)" in card.text
    assert "samples.csv" in card.text
    assert "samples.png" in card.text
    assert "Repair of" not in card.text


@pytest.mark.parametrize(
    "metrics, said",
    [
        (None, "has no evaluation to write a model card from: run `naign evaluate .*` first"),
        ("[]", "metrics.json lacks what a model card says .*: run"),
        ('{"images_seen": 12345}', "metrics.json lacks what a model card says .*: run"),
        ('{"weights": "others"}', "is of other weights or prior: run `naign evaluate"),
    ],
)
def test_without_an_evaluation_of_this_model_nothing_is_written(
    hub,
    copy,
    tmp_path,
    metrics,
    said,
):
    place, file = copy
    file.unlink()
    if metrics is not None:
        file.write_text(metrics)
    with refused(said):
        push(str(place), "me/digits")
    with refused(said):
        push(str(place), "me/digits", dry_run=tmp_path / "out")
    assert not hub.requests
    assert not (tmp_path / "out").exists()


def test_a_card_asks_for_classes_that_were_among_the_training_images(copy, tmp_path):
    place, file = copy
    model = NAIGN.from_pretrained(place)
    labels = ("fox", "\N{DOG FACE}")
    config = MixtureConfig(classes=True, components=2)
    prior = build_prior(config, model.shape, model.network, labels=labels)
    prior.class_counts[1] = 5
    metadata = model.metadata | {"prior": asdict(config), "labels": labels}
    other = NAIGN(model.network, metadata, prior_state(prior))
    other.save_pretrained(place)
    metrics = json.loads(file.read_text())
    metrics["weights"] = fingerprint(other)
    file.write_text(json.dumps(metrics))
    push(str(place), "me/pets", dry_run=tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert 'label="\N{DOG FACE}")' in text
    assert "asked for by class: \N{DOG FACE}." in text
    assert "fox" not in text


def test_what_the_hub_must_not_take_is_not_sent(hub, run):
    with refused('was not uploaded .*"license" must be one of'):
        push(run, "me/digits", license="mine")
    with refused("me/digits is public"):
        push(run, "me/digits", private=True)
    assert hub.models == {"me/digits": {}}
