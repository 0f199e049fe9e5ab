"""Commands write what they say, and never over what is there to be read."""

import json
import os
import shlex
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from naign.cli import model as cli
from naign.cli.main import main
from naign.errors import InputError
from naign.model.naign import NAIGN, read_settings
from naign.model.networks import build_network
from tests.model.test_files import write_run

CONV = {"name": "conv", "width": 4, "depth": 0, "code": 8}


def save_model(folder, network, shape, state=None, **more):
    metadata = {"model": network, "shape": list(shape), "prior": {"name": "none"}}
    torch.manual_seed(0)
    built = build_network(read_settings("model", network), shape)
    NAIGN(built, metadata | more, state).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", CONV, (1, 8, 8))


@pytest.fixture
def pictures(tmp_path):
    """Two folders of pictures: a/x.png, a/deep/y.JPG, b/x.png."""
    for name in ("a/x.png", "a/deep/y.JPG", "b/x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 20), 90).save(path)
    return tmp_path


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs the program, a line of words; it must end with this code. Returns what it says on stderr."""

    def run(line, code=2):
        monkeypatch.setattr("sys.argv", ["naign", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        return capsys.readouterr().err

    return run


def test_repairs_keep_the_folders_they_were_found_in(model, pictures):
    cli.restore(model, (pictures / "a",), to=pictures / "out")
    written = sorted(map(str, (pictures / "out").rglob("*.png")))
    assert written == [f"{pictures}/out/{name}.png" for name in ("deep/y", "x")]


def test_nothing_is_overwritten(model, pictures):
    before = (pictures / "b/x.png").read_bytes()
    (pictures / "there/x.png").mkdir(parents=True)
    for files, to, problem in (
        (["b/x.png"], "b", "would overwrite the input"),
        (["a", "b"], "out", "would both be written to"),
        (["b"], "there", "is a folder"),
        (["b"], "b/x.png", "would overwrite the input"),
        (["a"], "b/x.png", "x.png ends like a file: give a folder"),
    ):
        with pytest.raises(InputError, match=problem):
            cli.restore(model, tuple(pictures / file for file in files), to=pictures / to)
    assert not (pictures / "out").exists()
    assert (pictures / "b/x.png").read_bytes() == before


def test_a_file_that_is_not_a_picture_is_named(model, tmp_path, ended):
    (tmp_path / "x.png").write_bytes(b"text")
    with pytest.raises(InputError, match=r"x.png: .*picture"):
        cli.score(model, (tmp_path / "x.png",))
    said = ended(f"score {model} {tmp_path}/nowhere.png")
    assert "nowhere.png: No such file or directory: check the path, or choose another" in said


@pytest.mark.parametrize("to", ["model.txt", "samples.csv"])
def test_samples_go_only_to_a_file_that_can_hold_them(model, tmp_path, to):
    with pytest.raises(InputError, match="--to"):
        cli.sample(model, n=2, to=tmp_path / to)


def test_noise_of_a_model_that_never_learned_from_it_is_warned_of(tmp_path):
    for imle, expected in ((0.0, 1), (1.0, 0)):
        objective = {"name": "naign", "imle": imle, "third": "none"}
        model = save_model(tmp_path / f"{imle}", CONV, (1, 8, 8), config={"objective": objective})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            cli.sample(model, n=2, latents="noise", to=tmp_path / "samples.png")
        assert sum("without IMLE" in str(warning.message) for warning in told) == expected


def test_what_cannot_be_written_is_named_and_nothing_is_left(model, tmp_path, ended):
    (tmp_path / "there.png").mkdir()
    (tmp_path / "file").touch()
    for to in ("there.png", "file/x.png"):
        assert ended(f"sample {model} --n 2 --to {tmp_path}/{to}").endswith(", or choose another\n")
    assert set(os.listdir(tmp_path)) == {"file", "model", "there.png"}
    cli.sample(model, n=2, to=tmp_path / f"{250 * 'x'}.png")


def test_a_network_that_broke_down_says_so(model, pictures):
    broken = NAIGN.from_pretrained(model)
    broken.network.decoder[1].weight.fill_(3e38)
    broken.save_pretrained(pictures / "broken")
    with pytest.raises(InputError, match="not finite"):
        cli.sample(str(pictures / "broken"))
    with pytest.raises(InputError, match="not finite"):
        cli.score(str(pictures / "broken"), (pictures,))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory: tried 20.00 GiB"), RuntimeError("can't allocate memory")]
)
def test_too_little_memory_is_told_in_a_line(error, model, monkeypatch, ended):
    monkeypatch.setattr(NAIGN, "sample", Mock(side_effect=error))
    assert "too little memory" in ended(f"sample {model}")


def test_numbers_beyond_all_bounds_are_refused(model, ended):
    assert "--n is 2000000000000000000: it must be" in ended(f"sample {model} --n 2000000000000000000")
    with pytest.raises(InputError, match="--seed is 9999999999999999999: it must be 0 to"):
        cli.evaluate(model, seed=9999999999999999999)
    assert "--sample-check is -1: it must be at least 0" in ended("index tars --sample-check -1")


def test_points_are_only_sampled(tmp_path):
    points = save_model(tmp_path / "points", {"name": "mlp", "width": 8}, (2,))
    cli.sample(points, n=3, to=tmp_path / "points.csv")
    written = np.loadtxt(tmp_path / "points.csv", delimiter=",", dtype=np.float32)
    assert np.array_equal(written, NAIGN.from_pretrained(points).sample(3).numpy())
    for command in (cli.restore, cli.score):
        with pytest.raises(InputError, match="this command is for images, and the model takes points of"):
            command(points, (tmp_path / "points.csv",))


def test_commands_say_which_checkpoint_of_a_run_they_read(tmp_path, capsys, digits):
    run = str(write_run(tmp_path / "run"))
    for command in (
        lambda: cli.sample(run, n=2, to=tmp_path / "samples.png"),
        lambda: cli.score(run, (tmp_path / "samples.png",)),
        lambda: cli.export(run, to=tmp_path / "model"),
        lambda: cli.evaluate(run, data=digits, samples=20, device="cpu"),
    ):
        command()
        assert f"{run}: the newest checkpoint, step-00000050" in capsys.readouterr().err
    cli.sample(str(tmp_path / "model"), n=2, to=tmp_path / "samples.png")
    assert "checkpoint" not in capsys.readouterr().err
    record = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert record["checkpoint"] == "step-00000050"
    assert "step-00000050" in (tmp_path / "run/evaluation/report.html").read_text()


@pytest.mark.parametrize(("fitted", "warned"), [(0.5, True), (1.0, False)])
def test_a_prior_that_is_not_fitted_is_warned_of(tmp_path, capsys, fitted, warned):
    state = {
        "prior.weights": torch.ones(2) / 2,
        "prior.means": torch.zeros(2, 8),
        "prior.factors": torch.eye(8).expand(2, 8, 8),
        "prior.back": torch.eye(8),
        "prior.mean": torch.zeros(8),
    }
    prior = {"name": "gmm", "components": 2}
    model = save_model(
        tmp_path / "model",
        CONV,
        (1, 8, 8),
        state,
        prior=prior,
        fitted=fitted,
    )
    cli.sample(model, n=2, to=tmp_path / "a.png")
    assert ("stopped before its prior was fitted" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("line", ["sample ''", "sample RUN --to=", "train --config ''"])
def test_an_empty_text_is_refused(line, ended):
    assert "naign: error: '' is not a value (after " in ended(line)


def test_a_setting_may_be_empty(ended):
    assert "train.lrr" in ended("train --data.index= --run.remote '' --train.lrr=1")


def test_a_full_disk_is_worth_another_try(model, tmp_path, monkeypatch, ended):
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("naign.model.files.save_file", Mock(side_effect=full))
    said = ended(f"export {model} --to {tmp_path}/out", code=1)
    assert "naign: failed: " in said
    assert "No space left" in said


def test_an_address_without_a_bucket_is_shown_as_given(ended):
    assert ended("sample s3://") == "naign: error: s3://: no bucket: write s3://bucket/prefix\n"


SIGNED = ["sample https://h/x?X-Amz-Signature=SECRET", "train --data.path=s3:b?SECRET", "score x [s3:/b?SECRET]"]


@pytest.mark.parametrize("line", SIGNED)
def test_a_query_is_refused_and_not_shown(line, ended):
    said = ended(line)
    assert "a query, which messages would show" in said
    assert "SECRET" not in said


@pytest.mark.parametrize("line", ["export model --to", "restore model a --to"])
def test_an_address_is_not_a_local_folder(line, model, pictures, monkeypatch, ended):
    monkeypatch.chdir(pictures)
    assert "s3:/b/x is an address" in ended(f"{line} s3://b/x")
    assert not (pictures / "s3:").exists()


def test_an_export_replaces_only_exports(model, tmp_path, ended):
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    for source in (model, f"{model}/model.safetensors", f"{model}/"):
        assert "is the model itself" in ended(f"export {source} --to {model} --dtype float16")
    cli.export(model, to=tmp_path / "other")
    cli.export(model, to=tmp_path / "other")  # again, as by a script
    (tmp_path / "other/README.md").touch()
    with pytest.raises(InputError, match="holds more than an export"):
        cli.export(model, to=tmp_path / "other")
    write_run(tmp_path / "run")
    for inside in ("", "checkpoints"):
        with pytest.raises(InputError, match="holds more than an export"):
            cli.export(model, to=tmp_path / "run" / inside)
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights
