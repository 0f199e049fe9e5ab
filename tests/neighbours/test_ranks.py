"""Audits on real gloo ranks, by the launcher, and in a bucket: the same bytes everywhere."""

import json

import pytest

from naign.model.networks import ConvConfig
from naign.storage.store import open_store
from tests.conftest import train_command
from tests.distributed.audit_cases import FOLDER
from tests.distributed.ranks import on_ranks
from tests.neighbours.planted import audit, plant
from tests.programs import execute, succeeded

pytestmark = pytest.mark.slow
RESULTS = ("duplicates.json", "groups.csv", "groups.png")


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
    plant(f"{tmp_path}/data")
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
    assert len(alone) == 6
    for world in (2, 3):
        assert contents(tmp_path / str(world)) == alone


def test_launchers_start_audits(tmp_path, naign):
    path = plant(f"{tmp_path}/data")
    audit(path, tmp_path / "alone")
    launched = naign(
        "launch",
        "--processes=2",
        "duplicates",
        "--data",
        path,
        "--to",
        "two",
    )
    assert launched.returncode == 0, launched.stderr
    assert "13 of 790 images are in 6 groups" in launched.stdout
    command = [option for option in train_command(ranks=2) if not option.endswith("train.py")]
    command += ["-m", "naign.cli", "duplicates", "--data", path, "--to", "by-accelerate"]
    succeeded(execute(command, tmp_path))
    for name in RESULTS:
        expected = (tmp_path / "alone" / name).read_bytes()
        for to in ("two", "by-accelerate"):
            assert (tmp_path / to / name).read_bytes() == expected
    refused = naign(
        "launch",
        "--processes=2",
        "duplicates",
        "--data",
        "none",
    )
    assert refused.returncode == 2
    assert "none: no data set here" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_everything_may_lie_in_a_bucket(bucket, tmp_path):
    plant(f"{bucket}/data")
    found = audit(f"{bucket}/data", f"{bucket}/audit")
    audit(plant(f"{tmp_path}/data"), tmp_path / "local")
    store = open_store(f"{bucket}/audit")
    assert store.list() == sorted(RESULTS)
    assert json.loads(store.read("duplicates.json")) == found
    for name in RESULTS:
        assert store.read(name) == (tmp_path / "local" / name).read_bytes()
