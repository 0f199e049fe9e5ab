"""Commands write what they say, and never over what is there to be read."""

import json
import shlex
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from naign.cli import model as cli
from naign.cli.main import main
from naign.errors import InputError
from naign.model.naign import NAIGN
from naign.model.networks import build_network, recorded_network
from tests.model.test_files import write_run


@pytest.fixture
def model(tmp_path):
    metadata = {
        "model": {"name": "conv", "width": 4, "depth": 0, "code": 8},
        "shape": [1, 8, 8],
        "prior": {"name": "gaussian"},
    }
    torch.manual_seed(0)
    NAIGN(build_network(recorded_network(metadata["model"]), (1, 8, 8)), metadata).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def pictures(tmp_path):
    """Two folders of pictures: a/x.png, a/deep/y.JPG, b/x.png."""
    for name in ("a/x.png", "a/deep/y.JPG", "b/x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 12), 90, np.uint8)).save(path)
    return tmp_path


def ended(monkeypatch, capsys, *words):
    """The exit code of the program, and what it says on stderr."""
    monkeypatch.setattr("sys.argv", ["naign", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code, capsys.readouterr().err


def test_repairs_keep_the_folders_they_were_found_in(model, pictures):
    cli.restore(model, (pictures / "a",), to=pictures / "out", damage="noise")
    written = sorted(str(path.relative_to(pictures / "out")) for path in (pictures / "out").rglob("*.png"))
    assert written == ["deep/y.png", "noise/deep/y.png", "noise/x.png", "x.png"]


def test_two_inputs_for_one_output_are_refused(model, pictures):
    with pytest.raises(InputError, match="would both be written to"):
        cli.restore(model, (pictures / "a", pictures / "b"), to=pictures / "out")
    assert not (pictures / "out").exists()


def test_an_input_is_never_overwritten(model, pictures):
    before = (pictures / "b/x.png").read_bytes()
    with pytest.raises(InputError, match="would overwrite the input"):
        cli.restore(model, (pictures / "b/x.png",), to=pictures / "b")
    assert (pictures / "b/x.png").read_bytes() == before


def test_damaged_pictures_overwrite_nothing(model, pictures):
    (pictures / "a/noise").mkdir()
    (pictures / "a/x.png").rename(pictures / "a/noise/x.png")
    before = (pictures / "a/noise/x.png").read_bytes()
    with pytest.raises(InputError, match="would overwrite the input"):
        cli.restore(model, (pictures / "a/noise",), to=pictures / "a", damage="noise")
    assert (pictures / "a/noise/x.png").read_bytes() == before
    with pytest.raises(InputError, match="would both be written to .*noise/x.png"):
        cli.restore(model, (pictures / "a", pictures / "b"), to=pictures / "out", damage="noise")
    (pictures / "out/x.png").mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder"):
        cli.restore(model, (pictures / "b",), to=pictures / "out")


def test_what_is_no_picture_is_named(model, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="x.png: no picture"):
        cli.score(model, (tmp_path / "x.png",))
    with pytest.raises(OSError, match="No such file .*nowhere.png"):  # which main() puts into words
        cli.score(model, (tmp_path / "nowhere.png",))


@pytest.mark.parametrize("to", ["model.txt", "samples.csv"])
def test_samples_go_only_to_a_file_that_can_hold_them(model, tmp_path, to):
    with pytest.raises(InputError, match="--to"):
        cli.sample(model, n=2, to=tmp_path / to)


def test_what_cannot_be_written_is_named_and_nothing_is_left(model, tmp_path):
    (tmp_path / "there.png").mkdir()
    with pytest.raises(OSError, match="Is a directory: .*/there.png") as caught:  # which main() puts into words
        cli.sample(model, n=2, to=tmp_path / "there.png")
    assert caught.value.filename == str(tmp_path / "there.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there.png"]
    cli.sample(model, n=2, to=tmp_path / f"{250 * 'x'}.png")


def test_a_network_that_broke_down_says_so(model, pictures):
    broken = NAIGN.from_pretrained(model)
    broken.network.decoder[1].weight.fill_(3e38)
    broken.save_pretrained(pictures / "broken")
    for command in (
        lambda: cli.sample(str(pictures / "broken")),
        lambda: cli.score(str(pictures / "broken"), (pictures,)),
    ):
        with pytest.raises(InputError, match="not finite"):
            command()


@pytest.mark.parametrize("said", ["CUDA out of memory: tried 20.00 GiB", "can't allocate memory: you tried"])
def test_too_little_memory_is_told_in_a_line(said, model, monkeypatch, capsys):
    def sample(*_args, **_options):
        raise torch.OutOfMemoryError(said) if "CUDA" in said else RuntimeError(said)

    monkeypatch.setattr(NAIGN, "sample", sample)
    monkeypatch.setattr("sys.argv", ["naign", "sample", model])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "too little memory" in capsys.readouterr().err


def test_more_samples_than_there_are_numbers_are_refused(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["naign", "sample", model, "--n", "2000000000000000000"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--n is 2000000000000000000: it must be" in capsys.readouterr().err


def test_an_energy_beyond_float32_is_named(tmp_path):
    metadata = {"shape": [2], "prior": {"name": "gaussian"}, "model": {"name": "mlp", "width": 8}}
    NAIGN(build_network(recorded_network(metadata["model"]), (2,)), metadata).save_pretrained(tmp_path / "points")
    (tmp_path / "big.csv").write_text("0,0\n1e25,1e25\n")
    with pytest.raises(InputError, match=r"big.csv:2: its energy is beyond float32"):
        cli.score(str(tmp_path / "points"), (tmp_path / "big.csv",))


def test_a_seed_that_no_generator_takes_is_refused(model):
    with pytest.raises(InputError, match="--seed is 9999999999999999999: it must be 0 to"):
        cli.evaluate(model, seed=9999999999999999999)


def test_repairs_are_not_written_to_a_file(model, pictures):
    with pytest.raises(InputError, match="x.png is a file: give a folder"):
        cli.restore(model, (pictures / "a",), to=pictures / "b/x.png")


@pytest.mark.parametrize(
    ("text", "said"),
    [("1,2\n3\n", "points.csv:2: '3'"), ("x,y\n1,2\n", "points.csv:1: 'x,y': .* no header"),
     ("1,2,3\n", "'1,2,3': .* 2 finite numbers a line"), ("1,nan\n", ":1: '1,nan'"), ("", "points.csv: empty"),
     ("1,2\n\n3,4\n", ":2: ''"), ("1,1e39\n", ":1: '1,1e39'")],
)  # fmt: skip
def test_what_are_no_points_of_the_model_is_named(tmp_path, text, said):
    metadata = {"model": {"name": "mlp", "width": 4}, "shape": [2], "prior": {"name": "gaussian"}}
    network = build_network(recorded_network(metadata["model"]), (2,))
    NAIGN(network, metadata).save_pretrained(tmp_path / "model")
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        cli.score(str(tmp_path / "model"), (tmp_path,))
    with pytest.raises(InputError, match=said):
        cli.restore(str(tmp_path / "model"), (tmp_path / "points.csv",), to=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--damage and --mask are for images"):
        cli.restore(str(tmp_path / "model"), (tmp_path / "points.csv",), damage="noise")


@pytest.mark.parametrize(
    ("patience", "chosen"), [(2, "the best checkpoint, step-00000010"), (0, "the last checkpoint")]
)
def test_commands_say_which_checkpoint_of_a_run_they_read(tmp_path, capsys, digits, patience, chosen):
    run = str(write_run(tmp_path / "run", patience=patience))
    for command in (
        lambda: cli.sample(run, n=2, to=tmp_path / "samples.png"),
        lambda: cli.score(run, (tmp_path / "samples.png",)),
        lambda: cli.export(run, to=tmp_path / "model"),
        lambda: cli.evaluate(run, data=digits, samples=20, device="cpu"),
    ):
        command()
        assert f"{run}: {chosen}" in capsys.readouterr().err
    cli.sample(str(tmp_path / "model"), n=2, to=tmp_path / "samples.png")
    assert "checkpoint" not in capsys.readouterr().err
    record = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["checkpoint"]
    assert record["choice"] in chosen and record["choice"] in (tmp_path / "run/evaluation/report.html").read_text()


def test_a_prior_that_has_not_begun_is_warned_of(tmp_path, capsys):
    metadata = {"model": {"name": "conv", "width": 4, "code": 8}, "shape": [1, 8, 8]}
    metadata["prior"] = {"name": "gmm", "components": 2}
    state = {"weights": torch.tensor([1.0, 0.0]), "means": torch.zeros(2, 8), "factors": torch.eye(8).expand(2, 8, 8)}
    for weights, warned in ((torch.tensor([1.0, 0.0]), True), (torch.tensor([0.5, 0.5]), False)):
        network = build_network(recorded_network(metadata["model"]), (1, 8, 8))
        NAIGN(network, metadata, state | {"weights": weights}).save_pretrained(tmp_path)
        cli.sample(str(tmp_path), n=2, to=tmp_path / "a.png")
        assert ("stopped before prior.begin" in capsys.readouterr().err) == warned


EMPTY = ["sample ''", "export RUN --to ''", "restore RUN ''", "score RUN --json ''", "runs ''", "sample RUN --to="]
EMPTY += ["push RUN user/x --dry_run ''", "evaluate '' --samples 20", "index DATA --labels ''", "train --config ''"]
EMPTY += ["render k8s --data s3://abc/d --run ''", "render slurm --data d --run=", "pack folder --root '' --to x"]


@pytest.mark.parametrize("words", EMPTY)
def test_an_empty_text_is_no_path(words, monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, *shlex.split(words))
    assert code == 2 and "naign: error: '' is no path (after " in said


def test_a_text_that_may_be_empty_is_taken(monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, "index", "nowhere", "--label", "")
    assert code == 2 and "no .tar there" in said


@pytest.mark.parametrize("run", ["gs://bucket/x", " "])
def test_a_run_that_no_job_can_have_is_named_by_its_option(run, monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, "render", "slurm", "--data", "/data", "--run", run)
    assert code == 2 and f"--run {run}: write s3://" in said and "for Slurm a shared folder" in said


def test_a_full_disk_is_worth_another_try(model, tmp_path, monkeypatch, capsys):
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("naign.model.files.save_file", Mock(side_effect=full))
    code, said = ended(monkeypatch, capsys, "export", model, "--to", tmp_path / "out")
    assert code == 1 and "naign: failed: " in said and "No space left" in said


def test_names_of_labels_are_read_whole_or_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "names.txt"
    for text, problem in (("", f"{file} is empty: write"), ("a\nb\na\n", "names 'a' twice: write each")):
        file.write_text(text)
        code, said = ended(monkeypatch, capsys, "index", tmp_path, "--labels", file)
        assert code == 2 and f"--labels {problem}" in said


def test_an_address_without_a_bucket_is_shown_as_given(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, "sample", "s3://") == (
        *(2, "naign: error: s3://: no bucket: write s3://bucket/prefix\n"),
    )


def test_what_stands_in_the_way_asks_for_another_path(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.png").mkdir()
    (tmp_path / "file").touch()
    for to in ("there.png", "file/x.png"):
        code, said = ended(monkeypatch, capsys, "sample", model, "--n", "2", "--to", tmp_path / to)
        assert code == 2 and said.endswith(": choose another path\n")


SIGNED = ["sample https://h/x?X-Amz-Signature=SECRET", "train --data.path=s3://b/d?X-Amz-Signature=SECRET"]
SIGNED += ["train --data.path=s3:b?SECRET", "sample s3:b?SECRET", "runs [s3:/b?SECRET]", "sample hf:me/x?SECRET"]
SIGNED += ["pack folder --to x --root https://h/x?SECRET", "train --config https://h/x.yaml?SECRET"]


@pytest.mark.parametrize("words", SIGNED)
def test_a_query_is_refused_and_not_shown(words, monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, *words.split())
    assert code == 2 and "a query, which messages would show" in said and "SECRET" not in said


def test_an_address_is_no_local_folder(model, pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    written, packed = "s3:/b/x is an address", "--root s3://b/x: what is packed is a local folder"
    for words, message in (
        ("export {} --to", written),
        ("sample {} --to", written),
        ("restore {} a --to", written),
        ("push {} me/x --dry-run", written),
        ("pack folder --to x --root", packed),
    ):
        code, said = ended(monkeypatch, capsys, *words.format(model).split(), "s3://b/x")
        assert code == 2 and message in said
    assert not (pictures / "s3:").exists()


def test_an_export_replaces_no_model_that_it_should_not(model, tmp_path, monkeypatch, capsys):
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    for source in (model, f"{model}/model.safetensors", f"{model}/"):
        code, said = ended(monkeypatch, capsys, "export", source, "--to", model, "--dtype", "float16")
        assert code == 2 and "is the model itself" in said
    cli.export(model, to=tmp_path / "other")
    cli.export(model, to=tmp_path / "other")  # again, as by a script
    (tmp_path / "other/README.md").touch()
    with pytest.raises(InputError, match="another with a card"):
        cli.export(model, to=tmp_path / "other")
    write_run(tmp_path / "run")
    (tmp_path / "run/config.yaml").touch()
    for inside in ("checkpoints", "evaluation", "checkpoints/x"):
        with pytest.raises(InputError, match="is a run, or in one"):
            cli.export(model, to=tmp_path / "run" / inside)
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights
