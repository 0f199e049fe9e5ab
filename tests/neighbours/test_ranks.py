"""Audits on real gloo ranks, by the launcher, and in a bucket: the same bytes everywhere."""

import json

import pytest
from accelerate import Accelerator

from naign.model.networks import ConvConfig
from naign.neighbours import CopiesOptions
from naign.neighbours.copies import copies
from naign.storage.store import open_store
from tests.conftest import train_command
from tests.distributed.audit_cases import FOLDER
from tests.distributed.ranks import on_ranks
from tests.programs import execute, succeeded

pytestmark = pytest.mark.slow
RESULTS = ("copies.csv", "copies.json", "copies.png")


def contents(folder):
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def test_one_to_three_ranks_write_the_same_bytes(
    digits,
    save_untrained,
    tmp_path,
    monkeypatch,
):
    save_untrained(
        tmp_path / "model",
        data=digits,
        shape=(1, 8, 8),
        config=ConvConfig(width=4, code=8),
    )
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for world in (1, 2, 3):
        on_ranks("audit_cases.audits", world, tmp_path / f"ranks{world}")
    alone = contents(tmp_path / "1")
    assert len(alone) == 3
    for world in (2, 3):
        assert contents(tmp_path / str(world)) == alone


def test_launchers_start_audits(digits, save_untrained, tmp_path, naign):
    config = ConvConfig(width=4, code=8)
    save_untrained(tmp_path / "model", data=digits, shape=(1, 8, 8), config=config)
    alone = naign("copies", "model", "--to=alone")
    assert alone.returncode == 0, alone.stderr
    launched = naign("launch", "--processes=2", "copies", "model", "--to=two")
    assert launched.returncode == 0, launched.stderr
    assert "of a training image:" in launched.stdout
    command = [option for option in train_command(ranks=2) if not option.endswith("train.py")]
    command += ["-m", "naign.cli", "copies", "model", "--to=by-accelerate"]
    succeeded(execute(command, tmp_path))
    for name in RESULTS:
        expected = (tmp_path / "alone" / name).read_bytes()
        for to in ("two", "by-accelerate"):
            assert (tmp_path / to / name).read_bytes() == expected
    refused = naign("launch", "--processes=2", "copies", "none")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_everything_may_lie_in_a_bucket(bucket, digits, save_untrained, tmp_path):
    config = ConvConfig(width=4, code=8)
    save_untrained(tmp_path / "model", data=digits, shape=(1, 8, 8), config=config)
    options = CopiesOptions(samples=300, to=f"{bucket}/audit")
    found = copies(str(tmp_path / "model"), options, Accelerator(cpu=True))
    store = open_store(f"{bucket}/audit")
    assert store.list() == sorted(RESULTS)
    assert json.loads(store.read("copies.json")) == found
