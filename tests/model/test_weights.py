"""Which weights a place stands for: of a run those of its newest complete checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import bucket as in_bucket
from pipeline.checkpoint.bucket import upload
from pipeline.errors import InputError
from pipeline.model.naign import NAIGN
from pipeline.model.networks import build_network, recorded_network
from pipeline.storage.store import open_store
from tests.checkpoint.written import write_checkpoint

METADATA = {"model": {"name": "conv", "width": 4, "code": 8}, "shape": [1, 8, 8], "prior": {"name": "gaussian"}}


def write_run(folder: Path, *, average: bool = False) -> Path:
    """A run of checkpoints after 1 and 5 rounds."""
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
    return folder


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    run = write_run(tmp_path / "run")
    assert NAIGN.from_pretrained(run).checkpoint == "step-00000050"
    (run / "checkpoints/step-00000050/manifest.json").unlink()
    model = NAIGN.from_pretrained(run)
    assert model.checkpoint == "step-00000010"
    assert torch.equal(model.sample(2), NAIGN.from_pretrained(run / "checkpoints" / model.checkpoint).sample(2))


def test_a_checkpoint_and_its_file_are_no_run(tmp_path):
    newest = write_run(tmp_path / "run") / "checkpoints/step-00000050"
    for place in (newest, newest / "model.safetensors"):
        assert NAIGN.from_pretrained(place).checkpoint == ""


@pytest.mark.parametrize("average", [False, True])
def test_one_file_of_a_bucket_is_fetched(tmp_path, bucket, monkeypatch, average):
    run = write_run(tmp_path / "run", average=average)
    for checkpoint in (run / "checkpoints").iterdir():
        upload(checkpoint, bucket, [file.name for file in checkpoint.iterdir()])
    fetched: list[str] = []
    locate = in_bucket.locate
    monkeypatch.setattr(in_bucket, "locate", lambda url: fetched.append(url) or locate(url))
    model = NAIGN.from_pretrained(f"{bucket}/")
    assert model.checkpoint == "step-00000050"
    assert torch.equal(model.sample(2), NAIGN.from_pretrained(run).sample(2))
    file = "ema.safetensors" if average else "model.safetensors"
    assert fetched == [f"{bucket}/checkpoints/step-00000050/{file}"]

    open_store(f"{bucket}/checkpoints/step-00000050").put(file, b"damaged")
    assert NAIGN.from_pretrained(bucket).checkpoint == "step-00000010"


def test_a_bucket_without_checkpoints_is_refused(bucket):
    with pytest.raises(InputError, match=f"{bucket}/run holds no complete checkpoint"):
        NAIGN.from_pretrained(f"{bucket}/run")
