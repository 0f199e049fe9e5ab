"""FID and KID: torch-fidelity's own numbers of the same pictures; what is no Inception is refused."""

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.evaluate import inception, measures
from naign.evaluate.inception import check_count, open_inception
from naign.evaluate.run import evaluate
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig
from naign.observe.pictures import to_image
from tests.refused import refused

fidelity = pytest.importorskip("torch_fidelity")
from torch_fidelity import feature_extractor_inceptionv3 as published  # noqa: E402


@pytest.fixture
def weights(tmp_path):
    """A file of random weights of torch-fidelity's Inception, where the published ones cannot be had."""

    class Untrained(published.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return state

    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(empty))
    file = tmp_path / "inception.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.mark.slow
def test_fid_and_kid_are_those_of_torch_fidelity(weights, save_untrained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(published.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # the smallest that it takes
    monkeypatch.setattr(inception, "FEWEST", 1000)
    monkeypatch.setattr(measures, "VALUES", 64 * 500)  # fewer training images than FID is of
    run = save_untrained(tmp_path / "run", data=digits, shape=(1, 8, 8), config=ConvConfig(width=4, code=8))
    metrics = evaluate(str(run), samples=50, fid=str(weights), fid_samples=1000)
    assert any("are not the published ones" in note for note in metrics["notes"])
    found = metrics["inception"]

    train, _ = read_split(digits, "train")
    samples = NAIGN.from_pretrained(run).sample(1000, seed=0)
    for name, images in (("samples", samples), ("train", scaled(train))):
        folder = tmp_path / name
        folder.mkdir()
        for number, image in enumerate(images):
            to_image(image).save(folder / f"{number:05}.png")
    own = fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "train"),
        fid=True,
        kid=True,
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(weights),
    )
    assert found["fid"] == pytest.approx(own["frechet_inception_distance"], rel=1e-3)
    assert found["kid"] == pytest.approx(own["kernel_inception_distance_mean"], rel=1e-2)
    assert (found["samples"], found["train"]) == (1000, len(train))
    assert "FID is" in Path(run, "evaluation/report.html").read_text()


def test_few_images_are_refused(tmp_path):
    with refused("--fid needs at least 2,048 samples .*, not 2,047"):
        evaluate(str(tmp_path), fid="download", fid_samples=2047)
    with refused("--fid needs .*at most 16,777,216, not 1"):
        evaluate(str(tmp_path), fid="download", fid_samples=10**20)
    check_count("samples", 2048)


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "other.pth"
    with refused(f"no file {other}: give the file weights-inception-.*or say --fid download"):
        open_inception(str(other), "cpu")
    torch.save({"fc.weight": torch.zeros(3, 3)}, other)
    with refused("other.pth holds another network's weights"):
        open_inception(str(other), "cpu")
    Image.new("RGB", (4, 4)).save(other, "PNG")
    with refused("other.pth holds no weights"):
        open_inception(str(other), "cpu")


def test_a_pickle_in_the_file_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    file = tmp_path / "weights.pth"
    torch.save({"fc.weight": Harmful()}, file)
    with refused("holds no weights"):
        open_inception(str(file), "cpu")
    file.write_bytes(pickle.dumps(Harmful()))
    with refused("holds no weights"):
        open_inception(str(file), "cpu")
    assert not (tmp_path / "run").exists()
