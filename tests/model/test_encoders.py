"""The shipped encoders are what their headers say, and training one is a function of the images and the seed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import train_encoder
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.catalog import load
from naign.errors import InputError
from naign.model import encoders as module
from naign.model.encoders import FOLDER, choose_encoder, load_encoder, names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", names())
def test_shipped_files_are_small_described_and_load(name: str) -> None:
    encoder = load_encoder(name)
    assert encoder.shape is not None
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 1_000_000 * encoder.shape[0]  # a channel
    assert encoder.metadata["name"] == encoder.name == name
    assert encoder.metadata["dataset"] == name.removesuffix("-cnn64")
    assert "train_encoder --data data/" in encoder.metadata["command"]
    assert encoder.accuracy is not None
    images = torch.rand(3, *encoder.shape) * 2 - 1
    features = encoder.features(images)
    assert features.shape == (3, 64) and features.dtype == torch.float32
    assert (features < 0).any()  # the linear layer, before its ReLU
    assert encoder.logits(images).shape == (3, len(encoder.labels))
    torch.testing.assert_close(encoder.features(images, batch=2), features)


def test_mnist_is_right_on_99_percent() -> None:
    accuracy = load_encoder("mnist-cnn64").accuracy
    assert accuracy is not None and accuracy >= 0.99


def test_accuracy_on_digits_is_reproduced(digits: str) -> None:
    encoder = load_encoder("digits-cnn64")
    images, labels = read_split(digits, "test")
    found = float((encoder.logits(images.float() / 127.5 - 1).argmax(1) == labels).double().mean())
    assert found == pytest.approx(encoder.accuracy, abs=1.5 / len(labels))  # one image may round differently


@pytest.mark.slow
@pytest.mark.parametrize("data", ["mnist", "fashion_mnist"])
def test_accuracy_is_reproduced_where_the_data_are_packed(data: str) -> None:
    if not (ROOT / "data" / data / "index.json").is_file():
        pytest.skip(f"data/{data} is not packed here")
    encoder = load_encoder(f"{data}-cnn64")
    images, labels = read_split(str(ROOT / "data" / data), "test")
    found = float((encoder.logits(images.float() / 127.5 - 1).argmax(1) == labels).double().mean())
    assert found == pytest.approx(encoder.accuracy, abs=2e-4)


def test_an_encoder_is_chosen_by_name_and_shape(digits: str) -> None:
    manifest = Manifest.load(digits)
    assert choose_encoder(manifest).name == "digits-cnn64"
    assert choose_encoder(dataclasses.replace(manifest, name="letters")).name == "pixels"
    assert choose_encoder(dataclasses.replace(manifest, shape=(1, 16, 16))).name == "pixels"
    assert choose_encoder(dataclasses.replace(manifest, labels=())).name == "pixels"  # a folder of that name, say
    points = dataclasses.replace(manifest, kind="point", shape=(2,), dtype="float32")
    assert choose_encoder(points).name == "pixels"


def test_pixels_pools_images_and_keeps_points() -> None:
    encoder = load_encoder("pixels")
    assert encoder.features(torch.rand(2, 3, 32, 32)).shape == (2, 3 * 64)
    small = torch.rand(2, 1, 4, 6)
    assert torch.equal(encoder.features(small), small.flatten(1))
    points = torch.rand(5, 2)
    assert torch.equal(encoder.features(points), points)
    assert encoder.labels == () and encoder.accuracy is None


def test_errors_name_what_there_is() -> None:
    with pytest.raises(InputError, match="encoder is 'inception'.*mnist-cnn64.*pixels"):
        load_encoder("inception")
    with pytest.raises(AssertionError, match=r"reads \(1, 8, 8\), these images are \(3, 32, 32\)"):
        load_encoder("digits-cnn64").features(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": "[1, Infinity, 8]"}, "OverflowError"),
        ({"shape": "[1, 9, 9]"}, "RuntimeError"),
        ({"width": "1" + 30 * "0"}, "TypeError"),
        ({"width": "100000000"}, "RuntimeError"),  # by what the file holds, before anything of that size is made
        ({"labels": "7"}, "TypeError"),
        ({"accuracy": "good"}, "ValueError"),
        ({"weights": 1e300}, "not finite"),  # in the float32 that is computed in
        ({"weights": float("nan")}, "not finite"),
    ],
)
def test_a_file_of_a_stranger_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    own = FOLDER / "digits-cnn64.safetensors"
    with safe_open(own, "pt") as file:
        metadata = dict(file.metadata())
    factor = change.pop("weights", 1)
    weights = {name: weight.double() * factor for name, weight in load_file(own).items()}
    save_file(weights, tmp_path / "one.safetensors", metadata | change)
    with pytest.raises(InputError, match=f"one.safetensors is no encoder .*{said}") as caught:
        load_encoder(str(tmp_path / "one.safetensors"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes((FOLDER / "digits-cnn64.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="one.safetensors is no encoder"):
        load_encoder(str(tmp_path / "one.safetensors"))
    with pytest.raises(InputError, match="encoder is"):
        load_encoder(300 * "a")


@pytest.mark.slow
def test_training_does_not_depend_on_the_order_of_shards(digits: str) -> None:
    images, labels = read_split(digits, "train", limit=300)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    one = train_encoder.train(images, labels, classes=10, epochs=2, seed=1)
    two = train_encoder.train(images[shuffled], labels[shuffled], classes=10, epochs=2, seed=1)
    other = train_encoder.train(images, labels, classes=10, epochs=2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_augmentation_moves_little_and_mirrors_when_asked() -> None:
    images = torch.full((64, 1, 28, 28), -1.0)
    images[:, :, 10:18, 8:12] = 1.0
    generator = torch.Generator().manual_seed(0)
    moved = train_encoder.augment(images, flip=False, generator=generator)
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    columns = torch.arange(28.0)
    centre = ((moved + 1).sum((1, 2)) * columns).sum(1) / (moved + 1).sum((1, 2, 3))
    assert (centre - 9.5).abs().max() < 3.5  # 2 pixels of shift, 10 % of scale, 9 degrees
    mirrored = train_encoder.augment(images, flip=True, generator=generator)
    centre = ((mirrored + 1).sum((1, 2)) * columns).sum(1) / (mirrored + 1).sum((1, 2, 3))
    assert 16 < int((centre > 13.5).sum()) < 48


def test_command_line_trains_and_saves(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_encoder.main(["--data", digits, "--name", "small-cnn64", "--to", str(tmp_path), "--epochs", "8"])
    assert "small-cnn64: test accuracy 0." in capsys.readouterr().out
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    encoder = load_encoder("small-cnn64")
    assert encoder.labels == tuple("0123456789") and encoder.accuracy is not None and encoder.accuracy > 0.8


@pytest.mark.slow
def test_what_an_encoder_cannot_learn_from_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(load("toy2d:moons"), str(tmp_path / "points"), progress=False)
    options = ["--data", str(tmp_path / "points"), "--name", "x-cnn64", "--to", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        train_encoder.main(options)
    assert caught.value.code == 2 and "images with labels" in capsys.readouterr().err


def test_command_line_without_data_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_encoder.main(["--data", str(tmp_path / "none"), "--name", "x-cnn64", "--to", str(tmp_path)])
    assert caught.value.code == 2 and "none" in capsys.readouterr().err
