"""The shipped encoders are what their headers say, and training one is a function of the images and the seed."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from benchmarks import train_encoder
from naign.data.format.manifest import Manifest
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.model import encoders
from naign.model.encoders import FOLDER, choose_encoder, load_encoder, names, open_encoder
from tests.refused import refused

DIGITS = FOLDER / "digits-cnn64.safetensors"


@pytest.mark.parametrize("name", names())
def test_shipped_files_are_small_described_and_load(name):
    encoder = open_encoder("encoder", name, load_encoder(name).shape)
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 1_000_000 * encoder.shape[0]  # a channel
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        assert "train_encoder --data data/" in file.metadata()["command"]
    images = torch.rand(3, *encoder.shape) * 2 - 1
    features = encoder.features(images)
    assert features.shape == (3, 64)
    assert (features < 0).any()  # the linear layer, before its ReLU
    assert encoder.logits(images).shape == (3, len(encoder.labels))
    assert_close(encoder.features(images[:2]), features[:2])


def test_accuracy_on_digits_is_reproduced(digits):
    encoder = load_encoder("digits-cnn64")
    images, labels = read_split(digits, "test")
    right = encoder.logits(scaled(images)).argmax(1) == labels
    assert float(right.double().mean()) == pytest.approx(encoder.accuracy, abs=0.004)  # an image may round differently


@pytest.mark.parametrize(
    "change, chosen",
    [
        ({}, "digits-cnn64"),
        ({"name": "letters"}, "pixels"),
        ({"shape": (1, 16, 16)}, "pixels"),
        ({"labels": ()}, "pixels"),  # a folder of that name, say
    ],
)
def test_an_encoder_is_chosen_by_name_and_shape(digits, change, chosen):
    manifest = dataclasses.replace(Manifest.load(digits), **change)
    assert choose_encoder(manifest).name == chosen


def test_pixels_pools_images_and_keeps_points():
    encoder = load_encoder("pixels")
    assert encoder.features(torch.rand(2, 3, 32, 32)).shape == (2, 3 * 64)
    small = torch.rand(2, 1, 4, 6)
    assert torch.equal(encoder.features(small), small.flatten(1))
    points = torch.rand(5, 2)
    assert torch.equal(encoder.features(points), points)


class Odd(torch.nn.Module):
    """An encoder of another package that goes wrong."""

    def __init__(self, features):
        super().__init__()
        self.features = features


def out_of_memory(images):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "features, said",
    [
        (lambda images: images.flatten(1) * torch.inf * 0, "returns values that are not finite"),
        (lambda images: images.view(1, 40, 40, 40), "cannot read samples of shape .*RuntimeError"),
        (out_of_memory, "cannot read samples of shape .*OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_an_encoder_that_fails_is_refused_by_its_setting(features, said, monkeypatch):
    odd = encoders.Encoder(name="odd", network=Odd(features))
    monkeypatch.setattr(encoders, "load_encoder", lambda name: odd)
    with refused(f"objective.encoder 'odd' {said}"):
        open_encoder("objective.encoder", "odd", (3, 32, 32))


def test_errors_name_what_there_is():
    with refused("encoder.* is 'inception'.*mnist-cnn64.*efficientnet-lite2.*pixels"):
        load_encoder("inception")
    with refused(r"digits-cnn64' reads \(1, 8, 8\), these samples are \(3, 32, 32\)"):
        open_encoder("encoder", "digits-cnn64", (3, 32, 32))


@pytest.mark.parametrize(
    "change, factor, said",
    [
        ({"shape": "[1, Infinity, 8]"}, 1, "OverflowError"),
        ({"width": "100000000"}, 1, "RuntimeError"),  # before anything of that size is made
        ({"labels": "7"}, 1, "TypeError"),
        ({"accuracy": "good"}, 1, "ValueError"),
        ({}, 1e300, "not finite"),  # in the float32 that is computed in
    ],
)
def test_a_file_of_a_stranger_is_refused_in_one_line(tmp_path, change, factor, said):
    with safe_open(DIGITS, "pt") as file:
        metadata = file.metadata() | change
    weights = {name: weight.double() * factor for name, weight in load_file(DIGITS).items()}
    save_file(weights, tmp_path / "one.safetensors", metadata)
    with refused(f"one.safetensors is no encoder .*{said}") as caught:
        load_encoder(f"{tmp_path}/one.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.pt", "a.pkl"])
def test_files_that_can_run_code_are_refused_and_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with refused("may also be timm:NAME or the path of a .safetensors file, is .*choose one of"):
        load_encoder(str(tmp_path / name))


def test_command_line_trains_and_saves(digits, tmp_path, monkeypatch, capsys):
    train_encoder.main(["--data", digits, "--name", "small-cnn64", "--to", str(tmp_path), "--epochs", "8"])
    assert "small-cnn64: test accuracy 0." in capsys.readouterr().out
    monkeypatch.setattr(encoders, "FOLDER", tmp_path)
    encoder = load_encoder("small-cnn64")
    assert encoder.labels == tuple("0123456789")
    assert encoder.accuracy > 0.8


@pytest.mark.parametrize("data, said", [("points", "images with labels"), ("none", "none")])
def test_what_an_encoder_cannot_learn_from_is_bad_input(
    points,
    tmp_path,
    capsys,
    data,
    said,
):
    place = {"points": points, "none": f"{tmp_path}/none"}[data]
    with pytest.raises(SystemExit) as caught:
        train_encoder.main(["--data", place, "--name", "x-cnn64", "--to", str(tmp_path)])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
