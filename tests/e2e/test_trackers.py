"""Real trackings of a real run: one that fails costs nothing, MLflow's is resumed, and docs/tracking.md says it all."""

import re
import sqlite3

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, SMALL, direct_command, forked
from tests.e2e.runs import losses, reports
from tests.programs import execute, install, succeeded

ROW = re.compile(r"^\| (`.*?`) \| .* \| (.*?) \|$", re.MULTILINE)
"""Names and conditions of a row of the table."""

COUNTS = {"images_seen", "codes_seen", "round", "step"}

PACKAGE = {
    "my_package/__init__.py": "",
    "my_package/trackers.py": """
from accelerate.tracking import GeneralTracker


class Lines(GeneralTracker):
    name = "lines"
    requires_logging_directory = True
    tracker = None

    def __init__(self, project, folder):
        super().__init__()
        self.file = open(f"{folder}/lines.txt", "a")

    def log(self, values, step=None, **kwargs):
        if "loss/total" in values:  # of stage 1
            print(step, values["loss/total"], file=self.file, flush=True)


class Failing(Lines):
    def log(self, values, step=None, **kwargs):
        raise ConnectionError("no network")
""",
    "my_package-1.dist-info/entry_points.txt": """
[naign.trackers]
lines = my_package.trackers:Lines
failing = my_package.trackers:Failing
""",
}

EVERYTHING = [
    "--objective.denoising=1",
    "--objective.third=matched",
    "--prior.name=flow",
    "--prior.images=256",
    "--prior.width=16",
    "--prior.passes=1",
]
"""Settings with which a run reports all that it can without a GPU."""


@pytest.fixture
def site(tmp_path):
    """The path with a tracker as docs/tracking.md registers it, and one that fails."""
    return install(tmp_path, PACKAGE)


@pytest.mark.slow
def test_trackers_of_a_run(site, digits, tmp_path):
    def run(name, *options):
        env = forked(PYTHONPATH=site)
        env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
        command = direct_command(f"--data.path={digits}", f"--run.path={name}", *SMALL, *EVERYTHING, *options)
        done = succeeded(execute(command, tmp_path, env=env))
        assert "Traceback" not in done.stderr
        return done.stderr

    said = run(
        "run",
        "--train.images=512",
        "--report.trackers=[tensorboard, mlflow, lines]",
        "--report.pictures=1",
    )
    assert "warning: tracker " not in said
    folder = tmp_path / "run"

    # All that is reported is in the table of the page, and nothing else is.
    table = (ROOT / "docs/tracking.md").read_text().partition("## What a run reports")[2]
    named = set()
    for names, when in ROW.findall(table):
        if not any(word in when for word in ("gmm", "student", "several ranks")):
            named.update(re.findall(r"`(\S+?)`", names))
    reported = set().union(*reports(folder))
    assert len(named) > 25
    assert named == reported - COUNTS - {"time"}

    # TensorBoard has the same names, and no other series under one of them, which would make both unreadable.
    tags = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()
    assert set(tags["scalars"]) == named | COUNTS

    # A tracker that fails changes nothing.
    said = run("failing", "--train.images=512", "--report.trackers=failing")
    assert said.count("tracker failing failed and is left out from now on: ConnectionError: no network") == 1
    assert losses(folder) == losses(tmp_path / "failing")

    # A run that resumes goes on in the same run of MLflow, settings that may change included.
    (tmp_path / "more.yaml").write_text("report: {trackers: [mlflow, lines]}\n")
    run("run", "--config=more.yaml", "--train.images=768", "--resume=changed")
    metrics = reports(folder)
    expected = [(line["images_seen"], line["loss/total"]) for line in metrics if line["train/stage"] == 1]
    assert len(expected) == 3
    lines = [line.split() for line in (folder / "lines.txt").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in lines] == expected
    store = sqlite3.connect(tmp_path / "mlflow.db")
    assert store.execute("SELECT run_uuid FROM runs").fetchall() == [((folder / "trackers/mlflow").read_text(),)]
    points = store.execute("SELECT step, value FROM metrics WHERE key = 'loss/total' ORDER BY step")
    assert points.fetchall() == expected
    assert store.execute("SELECT value FROM params WHERE key = 'train.images'").fetchall() == [("512",)]
