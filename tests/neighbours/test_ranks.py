"""Audits on real gloo ranks, by the launcher, and in a bucket: the same bytes everywhere."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from naign.data.format.manifest import Manifest
from naign.model.networks import ConvConfig
from naign.storage.store import open_store
from tests.conftest import Program, environment, train_command
from tests.distributed.audit_cases import FOLDER
from tests.distributed.ranks import on_ranks
from tests.neighbours.planted import audit, plant

pytestmark = pytest.mark.slow
RESULTS = ("duplicates.json", "groups.csv", "groups.png")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_one_to_four_ranks_write_the_same_bytes(
    digits: str, save_untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(str(tmp_path / "data"))
    save_untrained(tmp_path / "model", data=digits, shape=(1, 8, 8), config=ConvConfig(width=4, code=8))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for world in (1, 2, 3, 4):
        on_ranks("audit_cases.audits", world, tmp_path / f"ranks{world}")
    alone = contents(tmp_path / "1")
    assert len([name for name in alone if "work" not in name]) == len(alone) > 8
    assert all(contents(tmp_path / str(world)) == alone for world in (2, 3, 4))


def test_launchers_start_audits(tmp_path: Path, naign: Program) -> None:
    path = plant(str(tmp_path / "data"))
    audit(path, tmp_path / "alone")
    launched = naign("launch", "--processes=2", "duplicates", "--data", path, "--to", "two", real=True)
    assert launched.returncode == 0 and "13 of 790 images are in 6 groups" in launched.stdout, launched.stderr
    assert naign("launch", "duplicates", "--data", path, "--to", "one", real=True).stdout
    accelerate = [option for option in train_command(ranks=2) if not option.endswith("train.py")]
    command = [*accelerate, "-m", "naign.cli", "duplicates", "--data", path, "--to", "by-accelerate"]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    for name in RESULTS:
        expected = (tmp_path / "alone" / name).read_bytes()
        assert all((tmp_path / to / name).read_bytes() == expected for to in ("one", "two", "by-accelerate"))
    refused = naign("launch", "--processes=2", "duplicates", "--data", "none", real=True)
    assert refused.returncode == 2 and "none: no data set here" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_audit_that_is_ended_goes_on(number: int, tmp_path: Path) -> None:
    path = plant(str(tmp_path / "data"))
    audit(path, tmp_path / "whole")
    slowly = "import time; from naign.neighbours.work import Work; keep = Work.keep\n"
    slowly += "Work.keep = lambda *args: (keep(*args), time.sleep(100))\n"
    slowly += f"import sys; sys.argv = ['naign', 'duplicates', '--data', {path!r}, '--to', 'cut']\n"
    slowly += "from naign.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", slowly], cwd=tmp_path, env=environment())
    end = time.monotonic() + 120
    while not list(tmp_path.glob("cut/work-*")) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait() != 0
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("cut/work-*")}
    assert len(kept) == 1
    audit(path, tmp_path / "cut")
    assert all((tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in RESULTS)


def test_everything_may_lie_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    plant(f"{bucket}/data")
    found = audit(f"{bucket}/data", f"{bucket}/audit", drop=f"{bucket}/thin")
    audit(plant(str(tmp_path / "data")), tmp_path / "local", drop=str(tmp_path / "thin"))
    store = open_store(f"{bucket}/audit")
    assert store.list() == sorted(RESULTS) and json.loads(store.read("duplicates.json")) == found
    assert all(store.read(name) == (tmp_path / "local" / name).read_bytes() for name in RESULTS)
    assert Manifest.load(f"{bucket}/thin") == Manifest.load(str(tmp_path / "thin"))
