"""Which weights a place stands for: of a run those of the newest undamaged checkpoint."""

import json
import os
import shutil

import pytest
import torch

from naign.checkpoint import bucket as in_bucket
from naign.checkpoint.bucket import upload
from naign.model.naign import NAIGN
from naign.storage.store import open_store
from tests.checkpoint.written import write_checkpoint
from tests.model.made import make_model
from tests.refused import refused

BEFORE = "step-00000010"
LAST = "step-00000050"


def write_run(folder, *, average=False):
    """A run of checkpoints after 1 and 5 rounds."""
    for rounds, name in ((1, BEFORE), (5, LAST)):
        model = make_model()
        model.network.decoder[1].bias.fill_(float(rounds))

        def fill(place, model=model, rounds=rounds):
            model.save_pretrained(place)
            if average:
                (place / "model.safetensors").rename(place / "ema.safetensors")
                (place / "model.safetensors").write_bytes(b"what resuming needs")
            (place / "trainer.json").write_text(json.dumps({"round": rounds}))

        write_checkpoint(folder / "checkpoints" / name, fill)
    return folder


def chosen(place):
    return NAIGN.from_pretrained(place).checkpoint


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path):
    run = write_run(tmp_path)
    assert chosen(run) == LAST
    checkpoint = run / "checkpoints" / LAST
    for place in (checkpoint, checkpoint / "model.safetensors"):
        assert chosen(place) == ""


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_one_file_of_a_bucket_is_fetched(tmp_path, bucket, monkeypatch, file):
    run = write_run(tmp_path / "run", average=file == "ema.safetensors")
    for checkpoint in (run / "checkpoints").iterdir():
        upload(checkpoint, bucket, os.listdir(checkpoint))
    fetched = []
    locate = in_bucket.locate
    monkeypatch.setattr(in_bucket, "locate", lambda url: fetched.append(url) or locate(url))
    assert chosen(f"{bucket}/") == LAST
    assert fetched == [f"{bucket}/checkpoints/{LAST}/{file}"]
    found = NAIGN.from_pretrained(bucket).sample(2)
    assert torch.equal(found, NAIGN.from_pretrained(run).sample(2))
    open_store(f"{bucket}/checkpoints/{LAST}").put(file, b"damaged")
    assert chosen(bucket) == BEFORE


def test_a_bucket_without_checkpoints_is_refused(bucket):
    with refused(f"{bucket}/run holds no complete checkpoint"):
        NAIGN.from_pretrained(f"{bucket}/run")


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(tmp_path, caplog):
    run = write_run(tmp_path / "run")
    (run / "checkpoints/step-00000099").mkdir()  # is being written
    assert chosen(run) == LAST
    assert not caplog.text
    (run / "checkpoints" / LAST / "model.safetensors").write_bytes(b"cut")
    assert chosen(run) == BEFORE
    assert f"{LAST} is damaged or incomplete" in caplog.text
    assert "step-00000099" not in caplog.text
    (run / "checkpoints" / BEFORE / "model.safetensors").write_bytes(b"cut")
    with refused("all checkpoints of '.*run' are damaged or incomplete: copy one again"):
        NAIGN.from_pretrained(run)
    shutil.rmtree(run / "checkpoints")
    with refused("has no complete checkpoint and no model.safetensors"):
        NAIGN.from_pretrained(run)


@pytest.mark.parametrize("place", ["https://h/x?SECRET", "https:h?SECRET", "hf://me/x?SECRET", "s3:b?SECRET"])
def test_a_query_is_not_shown(place):
    with refused("a query, which messages would show") as caught:
        NAIGN.from_pretrained(place)
    assert "SECRET" not in str(caught.value)
