"""A pushed model has a card that says what its evaluation says, whose example runs, and nothing of this machine."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from naign.model.prior.gmm import GmmConfig

from naign.cli.model import export, push
from naign.errors import InputError
from naign.evaluate.report import number
from naign.evaluate.run import evaluate
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, PointConfig
from naign.model.prior import build_prior
from tests.conftest import environment
from tests.hub import Hub

Save = Callable[..., str]
TINY = ConvConfig(width=8, code=8, init="/home/someone/runs/first")


@pytest.fixture(scope="module")
def run(digits: str, save_untrained: Save, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An evaluated model."""
    folder = tmp_path_factory.mktemp("run")
    save_untrained(folder, data=digits, shape=(1, 8, 8), config=TINY, dataset="digits")
    evaluate(str(folder), samples=50, progress=False)
    return str(folder)


@pytest.mark.slow
def test_the_card_says_what_was_measured_and_its_example_runs(hub: Hub, run: str, digits: str) -> None:
    push(run, "me/digits", license="mit", private=True)
    files, metrics = hub.models["me/digits"], json.loads(Path(run, "evaluation/metrics.json").read_text())
    assert hub.private == {"me/digits"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("mit", "naign", None)
    blur = metrics["restoration"]["blur"]
    assert all(f"| {number(value)} |" in card.text for value in (metrics["fd"]["once"], metrics["coverage"]["recall"]))
    assert all(f"→ {number(value)} |" in card.text for value in (blur["once"], blur["psnr"]["once"]))
    assert all(note in card.text for note in metrics["notes"]) and "under mit" in card.text
    pictures = set(re.findall(r"\]\((\w+\.png)\)", card.text))
    assert pictures | {"README.md", "config.json", "model.safetensors"} == set(files) and len(pictures) == 8
    for place in (digits, run, "/home/someone"):
        assert not [name for name, content in files.items() if place.encode() in content]
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    assert torch.equal(names["samples"], NAIGN.from_pretrained(run).sample(16)) and names["energy"].shape == (16,)


def test_a_card_has_no_paths_of_encoders_and_no_nan(hub: Hub, run: str, tmp_path: Path) -> None:
    place, out = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "out"
    metrics = json.loads((place / "evaluation/metrics.json").read_text())
    metrics["second"] = metrics["fd"] | {"encoder": "/home/some one/features.pt", "twice": math.nan}
    metrics["warnings"] = ["Trained with /home/some one/features.pt."]
    metrics["notes"] = ["None at s3://bucket/private/lite2.pt, 8×8."]
    (place / "evaluation/metrics.json").write_text(json.dumps(metrics))
    push(str(place), "me/digits", dry_run=out)
    card = ModelCard.load(out / "README.md")
    assert "Trained with features.pt." in card.text and "None at lite2.pt, 8×8." in card.text
    assert not [word for word in ("/home", "some one", "bucket", "private", "nan") if word in card.content]
    assert f"| features.pt | {number(metrics['fd']['once'])} |" in card.text
    (place / "evaluation/metrics.json").write_text(json.dumps(metrics | {"cpu_seconds": 10**400}))
    with pytest.raises(InputError, match=r"metrics.json lacks what a model card says \(.*too large"):
        push(str(place), "me/digits", dry_run=tmp_path / "again")


def test_an_export_is_halved_and_has_a_card_of_its_measurements(run: str, digits: str, tmp_path: Path) -> None:
    half, model = tmp_path / "half", NAIGN.from_pretrained(run)
    export(run, to=half, dtype="float16")
    sizes = [Path(place, "model.safetensors").stat().st_size for place in (half, run)]
    assert sizes[0] < 0.6 * sizes[1]
    close = NAIGN.from_pretrained(half)
    assert next(close.network.parameters()).dtype == torch.float32 and not torch.equal(close.sample(3), model.sample(3))
    torch.testing.assert_close(close.sample(3), model.sample(3), atol=0.01, rtol=0)
    with pytest.raises(InputError, match="half has no evaluation to write a model card from: run `naign evaluate"):
        push(str(half), "digits", dry_run=tmp_path / "out/digits")
    assert not (tmp_path / "out").exists()
    evaluate(str(half), data=digits, samples=50, progress=False)
    push(str(half), "digits", dry_run=tmp_path / "out/digits", license="mit")
    text = (tmp_path / "out/digits/README.md").read_text()
    assert (
        'NAIGN.from_pretrained("digits")' in text
        and "naign sample digits --n" in text
        and "(float16)" in text
        and "under mit" in text
    )
    assert (tmp_path / "out/digits/samples.png").exists()
    assert (tmp_path / "out/digits/model.safetensors").stat().st_size == pytest.approx(sizes[0], rel=0.1)
    export(str(half), to=tmp_path / "full", dtype="float32")
    assert torch.equal(NAIGN.from_pretrained(tmp_path / "full").sample(3), close.sample(3))
    next(model.network.parameters()).data.fill_(1e5)
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="beyond 65504, which float16 does not hold: store it as float32"):
        export(str(tmp_path / "large"), to=tmp_path / "none", dtype="float16")
    assert not [*(tmp_path / "none").glob("*")]
    with pytest.raises(InputError, match="--dtype is for --format safetensors"):
        export(run, to=tmp_path / "none", dtype="float16", format="onnx")


def test_a_dry_run_needs_a_new_or_empty_folder(
    hub: Hub, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    for place in ("mine", "mine/README.md"):
        with pytest.raises(InputError, match=f"{place} holds something already: give a new or empty folder"):
            push(run, "me/digits", dry_run=tmp_path / place)
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    (tmp_path / "out").mkdir()
    push(run, "me/digits", dry_run=tmp_path / "out")
    files = len(list((tmp_path / "out").iterdir()))
    assert capsys.readouterr().out.endswith(f"wrote {files} files to {tmp_path}/out/, uploaded nothing\n")


def test_a_dry_run_uploads_nothing(hub: Hub, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    push(run, "me/digits", dry_run=tmp_path / "out")
    assert not hub.requests and "states no licence" in (tmp_path / "out/README.md").read_text()
    assert torch.equal(NAIGN.from_pretrained(tmp_path / "out").sample(3), NAIGN.from_pretrained(run).sample(3))
    with pytest.raises(InputError, match="needs a login"):
        push(run, "me/digits")


def test_points_have_a_card(points: str, save_untrained: Save, tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "run", data=points, shape=(2,), config=PointConfig(name="mlp", width=8))
    evaluate(folder, samples=50, progress=False)
    push(folder, "me/points", dry_run=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.pipeline_tag is None and "samples.csv" in card.text and "samples.png" in card.text
    assert "Repair of" not in card.text and "recall" in card.text.lower()


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (None, "has no evaluation to write a model card from: run `naign evaluate .*` first"),
        ("{", "metrics.json lacks what a model card says .*: run"),
        ("[]", "metrics.json lacks what a model card says .*: run"),
        ('{"images_seen": 99}', "is of its state after 99 images, not 12345: run"),
        ('{"images_seen": 12345}', "metrics.json lacks what a model card says .*: run"),
    ],
)
def test_without_an_evaluation_nothing_is_written(
    hub: Hub, save_untrained: Save, tmp_path: Path, metrics: str | None, said: str
) -> None:
    folder = save_untrained(tmp_path / "run", data=None, shape=(1, 8, 8), config=TINY)
    if metrics is not None:
        (tmp_path / "run/evaluation").mkdir()
        (tmp_path / "run/evaluation/metrics.json").write_text(metrics)
    for options in ({}, {"dry_run": tmp_path / "out"}):
        with pytest.raises(InputError, match=said):
            push(folder, "me/digits", **options)  # type: ignore[arg-type]
    assert not hub.requests and not (tmp_path / "out").exists()


def test_the_evaluation_of_another_model_is_not_published(hub: Hub, run: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    model = NAIGN.from_pretrained(run)
    with torch.no_grad():
        next(model.network.parameters()).mul_(1.01)
    model.save_pretrained(tmp_path / "other")  # as another seed, which has seen as many images
    with pytest.raises(InputError, match="is of other weights or prior: run `naign evaluate"):
        push(str(tmp_path / "other"), "me/digits", dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_asks_for_classes_that_were_among_the_training_images(run: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    model, labels = NAIGN.from_pretrained(run), ("fox", "\N{DOG FACE}")
    config = GmmConfig(classes=True, components=2)
    state = build_prior(config, model.shape, model.network, labels=labels).state_dict()
    state["class_counts"][1] = 5
    metadata = model.metadata | {"prior": asdict(config), "labels": labels}
    NAIGN(model.network, metadata, state).save_pretrained(tmp_path / "run")
    place = tmp_path / "run/evaluation/metrics.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"weights": None}))
    push(str(tmp_path / "run"), "me/pets", dry_run=tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert 'label="\N{DOG FACE}")' in text and "asked for by class: \N{DOG FACE}." in text and "fox" not in text


def test_a_card_says_what_the_model_learned_not_what_it_was_measured_on(
    digits: str, save_untrained: Save, tmp_path: Path
) -> None:
    folder = save_untrained(tmp_path / "run", data=None, shape=(1, 8, 8), config=TINY, dataset="mnist")
    evaluate(folder, data=digits, samples=50, progress=False)
    push(folder, "me/mnist", dry_run=tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "trained on\n[mnist](https://huggingface.co/datasets/ylecun/mnist)" in text
    assert "On the test split of digits" in text and "datasets:\n- ylecun/mnist" in text


def test_what_the_hub_must_not_take_is_not_sent(hub: Hub, run: str) -> None:
    with pytest.raises(InputError, match='was not uploaded .*"license" must be one of'):
        push(run, "me/digits", license="mine")
    with pytest.raises(InputError, match="me/digits is there and is public"):
        push(run, "me/digits", private=True)
    assert hub.models == {"me/digits": {}}


@pytest.mark.slow
def test_the_command_finds_the_hub_through_the_environment(hub: Hub, run: str) -> None:
    command = [sys.executable, "-m", "naign.cli", "push", run, "me/digits", "--license", "mit"]
    env = environment(**hub.environment)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and f"uploaded: {hub.endpoint}/me/digits" in done.stdout, done.stderr
    assert hub.token not in done.stdout + done.stderr
    assert torch.equal(NAIGN.from_pretrained("hf://me/digits").sample(3), NAIGN.from_pretrained(run).sample(3))
