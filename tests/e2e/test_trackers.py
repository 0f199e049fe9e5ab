"""Real trackings of a real run: one that hangs costs nothing, MLflow's is resumed, and docs/tracking.md says it all."""

import json
import os
import re
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import PYTHONPATH, ROOT, SMALL, direct_command, forked

PAGE = (ROOT / "docs/tracking.md").read_text()
ROW = re.compile(r"^\| (`.*?`) \| .* \| (.*?) \|$", re.MULTILINE)
"""Names and conditions of a row of the table."""
LINES = """
from accelerate.tracking import GeneralTracker

from naign.observe import accelerated


class Lines(GeneralTracker):
    name, requires_logging_directory, tracker = "lines", True, None

    def __init__(self, project, folder):
        super().__init__()
        self.file = open(f"{folder}/lines.txt", "a")

    def log(self, values, step=None, **kwargs):
        print(step, values["loss/total"], file=self.file, flush=True)


LINES = (None, accelerated(Lines))
"""
HANGING = """
import threading

from accelerate.tracking import GeneralTracker

from naign.observe import accelerated


class Hanging(GeneralTracker):
    name, requires_logging_directory, tracker = "hanging", False, None

    def __init__(self, project):
        super().__init__()

    def log(self, values, step=None, **kwargs):
        threading.Event().wait()


HANGING = (None, accelerated(Hanging))
"""
PATIENT = """
import os

from naign.observe import monitor

monitor.PATIENCE = 90 if "PATIENT" in os.environ else monitor.PATIENCE
"""
"""MLflow takes some seconds to create its tables, and more on a busy machine."""
POINTS = "[naign.trackers]\nlines = my_package.lines:LINES\nhanging = my_package.hanging:HANGING\n"
EVERYTHING = [
    *("--quality.rounds=1", "--quality.samples=100", "--match.reject_share=0.01", "--objective.denoising=1"),
    *("--prior.name=flow", "--prior.begin=0"),
    *("--prior.alone=0", "--prior.width=16", "--prior.passes=1", "--objective.third=matched"),
]
"""Settings with which a run reports all that it can without a GPU."""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A package with the tracker that docs/tracking.md registers, and one that hangs, as an installer leaves them."""
    info = "my_package-1.dist-info"
    files = {"my_package/__init__.py": PATIENT, "my_package/lines.py": LINES, "my_package/hanging.py": HANGING}
    files[f"{info}/entry_points.txt"] = POINTS
    files |= {f"{info}/METADATA": "Metadata-Version: 2.1\nName: my_package\nVersion: 1\n"}
    for name, text in files.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    return tmp_path / "site"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_trackers_of_a_run(site, digits, tmp_path):
    def run(name: str, *options: str, **more: str) -> str:
        env = forked(PYTHONPATH=os.pathsep.join([PYTHONPATH, str(site)]), **more)
        env = {key: value for key, value in env.items() if not key.startswith("MLFLOW_")}
        command = direct_command(f"--data.path={digits}", f"--run.path={name}", *SMALL, *EVERYTHING, *options)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    two = "--train.images=512"
    trackers = "--report.trackers=[tensorboard, mlflow, lines]"
    said = run("run", two, trackers, "--report.pictures=1", PATIENT="1")
    assert "warning: tracker " not in said
    folder = tmp_path / "run"

    # All that is reported is in the table of the page, and nothing else is.
    (first, second), rows = lines(folder), ROW.findall(PAGE.partition("## What a run reports")[2])
    here = [names for names, when in rows if "GPU" not in when and "student" not in when]  # a student learns without f
    named = [name for names in here for name in re.findall(r"`(\S+?)`", names)]
    assert len(named) > 45 and sorted(named) == sorted(
        second.keys() - {"images_seen", "codes_seen", "round", "step", "time"}
    )

    # TensorBoard has the same names, and no other series under one of them, which would make both unreadable.
    tags = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()
    assert sorted(tags["scalars"]) == sorted(named) and tags["histograms"] == ["match/distances"]

    # A tracker that hangs changes nothing.
    said = run("hanging", two, "--report.trackers=hanging")
    assert said.count("tracker hanging has not finished after 5 s: the run ends without it") == 1
    assert re.search(r"tracker hanging has missed \d+ reports", said) and said.count("tracker ") == 2
    assert [[(name, value) for name, value in line.items() if name.startswith("loss/")] for line in lines(folder)] == [
        [(name, value) for name, value in line.items() if name.startswith("loss/")]
        for line in lines(tmp_path / "hanging")
    ]
    assert (folder / "lines.txt").read_text() == "".join(
        f"{line['images_seen']} {line['loss/total']}\n" for line in (first, second)
    )

    # A run that resumes goes on in the same run of MLflow, settings that may change included.
    (tmp_path / "more.yaml").write_text("report: {trackers: [mlflow, lines]}\n")
    run("run", "--config=more.yaml", "--train.images=768", "--resume=changed", PATIENT="1")
    store = sqlite3.connect(folder / "mlflow/mlflow.db")
    ((id, artifacts),) = store.execute("SELECT run_uuid, artifact_uri FROM runs").fetchall()
    assert id == (folder / "trackers/mlflow").read_text() and artifacts.startswith(str(folder / "mlflow"))
    points = store.execute("SELECT value, step FROM metrics WHERE key = 'loss/total' ORDER BY step").fetchall()
    assert points == [(line["loss/total"], line["images_seen"]) for line in lines(folder)] and len(points) == 3
    assert store.execute("SELECT value FROM params WHERE key = 'train.images'").fetchall() == [("512",)]
    assert len(list(Path(artifacts, "samples").iterdir())) == 6
