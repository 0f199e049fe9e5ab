"""Which weights a place stands for: of a run the best checkpoint where patience ended it, else the newest."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from naign.checkpoint import bucket as in_bucket
from naign.checkpoint.bucket import upload
from naign.cli.files import write_samples
from naign.errors import InputError
from naign.model.naign import NAIGN
from naign.model.networks import build_network, recorded_network
from naign.settings.budget import measured_by
from naign.storage.store import open_store
from tests.checkpoint.written import write_checkpoint

METADATA = {"model": {"name": "conv", "width": 4, "code": 8}, "shape": [1, 8, 8], "prior": {"name": "gaussian"}}


def write_run(
    folder: Path, *, patience: object = 2, best: object = "step-00000010", samples: int = 50, average: bool = False
) -> Path:
    """A run of checkpoints after 1 and 5 rounds, whose quality was measured every 2 rounds and best after the first."""
    for number, rounds in enumerate((1, 5)):
        torch.manual_seed(number)
        model = NAIGN(build_network(recorded_network(METADATA["model"]), (1, 8, 8)), METADATA)

        def fill(place: Path, model: NAIGN = model, rounds: int = rounds) -> None:
            model.save_pretrained(place)
            if average:
                (place / "model.safetensors").rename(place / "ema.safetensors")
                (place / "model.safetensors").write_bytes(b"what resuming needs")
            (place / "trainer.json").write_text(json.dumps({"round": rounds}))

        write_checkpoint(folder / f"checkpoints/step-000000{rounds}0", fill)
    settings = {"quality": {"rounds": 2, "patience": patience, "samples": 50}, "data": {"path": "data/digits"}}
    measured = measured_by({"quality.samples": samples, "data.path": "data/digits"})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "best.json").write_text(json.dumps({"checkpoint": best, "fd": 2.5, "round": 1, "measured": measured}))
    return folder


@pytest.mark.parametrize(
    ("settings", "choice"),
    [
        ({}, "best"),
        ({"patience": 3}, "last"),
        ({"patience": 0}, "last"),
        ({"patience": "two"}, "last"),
        ({"samples": 60}, "last"),  # measured otherwise than the run now measures
        ({"best": "step-00000077"}, "last"),
        ({"best": "../elsewhere"}, "last"),
        ({"best": None}, "last"),
    ],
)
def test_the_best_checkpoint_is_taken_where_patience_ended_the_run(tmp_path, settings, choice):
    model = NAIGN.from_pretrained(write_run(tmp_path, **settings))
    assert (model.choice, model.checkpoint) == (choice, {"best": "step-00000010", "last": "step-00000050"}[choice])
    assert torch.equal(model.sample(2), NAIGN.from_pretrained(tmp_path / "checkpoints" / model.checkpoint).sample(2))


@pytest.mark.parametrize("missing", ["config.yaml", "best.json", "checkpoints/step-00000010/manifest.json"])
def test_the_newest_is_taken_where_files_are_missing(tmp_path, missing):
    (write_run(tmp_path) / missing).unlink()
    assert NAIGN.from_pretrained(tmp_path).choice == "last"


def test_a_checkpoint_and_an_exported_folder_are_no_choice(tmp_path):
    newest = write_run(tmp_path / "run") / "checkpoints/step-00000050"
    for place in (newest, newest / "model.safetensors"):
        model = NAIGN.from_pretrained(place)
        assert (model.choice, model.checkpoint) == ("", "")


@pytest.mark.parametrize("average", [False, True])
def test_one_file_of_a_bucket_is_fetched(tmp_path, bucket, monkeypatch, average):
    run = write_run(tmp_path / "run", average=average)
    for checkpoint in (run / "checkpoints").iterdir():
        upload(checkpoint, bucket, [file.name for file in checkpoint.iterdir()])
    for name in ("config.yaml", "best.json"):
        open_store(bucket).put(name, (run / name).read_bytes())
    fetched: list[str] = []
    locate = in_bucket.locate
    monkeypatch.setattr(in_bucket, "locate", lambda url: fetched.append(url) or locate(url))
    model = NAIGN.from_pretrained(f"{bucket}/")
    assert (model.choice, model.checkpoint) == ("best", "step-00000010")
    assert torch.equal(model.sample(2), NAIGN.from_pretrained(run).sample(2))
    file = "ema.safetensors" if average else "model.safetensors"
    assert fetched == [f"{bucket}/checkpoints/step-00000010/{file}"]

    open_store(f"{bucket}/checkpoints/step-00000010").put(file, b"damaged")
    model = NAIGN.from_pretrained(bucket)
    assert (model.choice, model.checkpoint) == ("last", "step-00000050")


def test_a_bucket_without_checkpoints_is_refused(bucket):
    with pytest.raises(InputError, match=f"{bucket}/run holds no complete checkpoint"):
        NAIGN.from_pretrained(f"{bucket}/run")


def test_a_run_whose_checkpoints_are_all_damaged_says_so(tmp_path):
    write_run(tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"x")
    with pytest.raises(InputError, match="all checkpoints of '.*run' are damaged or incomplete: copy one again"):
        NAIGN.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("place", ["https://h/x?SECRET", "https:h?SECRET", "hf://me/x?SECRET", "s3:b?SECRET"])
def test_a_query_is_not_shown(place):
    with pytest.raises(InputError, match="a query, which messages would show") as refused:
        NAIGN.from_pretrained(place)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("place", ["", "."])
def test_samples_do_not_fill_the_current_folder(place):
    with pytest.raises(InputError, match="--to is the current folder"):
        write_samples(torch.zeros(2, 1, 8, 8), Path(place))
