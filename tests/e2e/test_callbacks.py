"""The callback of docs/extend.md is called; one that fails ends the run."""

import re
import sys
from types import SimpleNamespace

import pytest

from naign.errors import InputError
from naign.training.callbacks import Callback, call, find_callbacks
from tests.conftest import ROOT, SMALL, direct_command, forked
from tests.e2e.runs import column
from tests.programs import execute, install, succeeded

BLOCK = re.compile(r"^```python\n# (my_naign/note.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FAILING = """
from my_naign.note import Note


class Failing(Note):
    def on_checkpoint(self, run, folder):
        raise KeyError("lost")
"""
POINTS = """
[naign.callbacks]
note = my_naign.note:Note
failing = my_package.failing:Failing
"""
PROGRAM = """
import sys

from my_naign.note import Note
from naign.config import parse
from naign.distributed.connect import build_accelerator
from naign.training.loop import train

train(parse(sys.argv[1:]), build_accelerator(), callbacks=[Note()])
"""


@pytest.fixture
def site(tmp_path):
    """The path with the package of the page, and a callback that fails."""
    files = dict(BLOCK.findall((ROOT / "docs/extend.md").read_text()))
    files["my_package/failing.py"] = FAILING
    files["my_package-1.dist-info/entry_points.txt"] = POINTS
    return install(tmp_path, files)


@pytest.mark.slow
def test_callbacks_of_a_run(site, digits, tmp_path):
    def run(name, command):
        options = [f"--data.path={digits}", f"--run.path={name}", "--train.images=768", "--checkpoint.rounds=2"]
        command = [*command, *SMALL, *options]
        return execute(command, tmp_path, env=forked(PYTHONPATH=site))

    for name, command in (
        ("plain", direct_command()),
        ("named", direct_command("--train.callbacks=[note]")),
        ("given", [sys.executable, "-c", PROGRAM]),
    ):
        succeeded(run(name, command))
    losses = column(tmp_path / "plain", "loss/total")
    for name in ("named", "given"):
        assert (tmp_path / name / "copied.txt").read_text() == "step-00000016\nstep-00000024\n"
        assert column(tmp_path / name, "mine/rounds_left") == [2, 1, 0]
        assert column(tmp_path / name, "loss/total") == losses

    done = run("failing", direct_command("--train.callbacks=[note, failing]"))
    assert done.returncode == 1
    assert "KeyError: 'lost'" in done.stderr
    assert (tmp_path / "failing/copied.txt").read_text() == "step-00000016\n"  # the checkpoint before it is there


class Adding(Callback):
    value = 2

    def on_round(self, run, values):
        values["mine"] = self.value


def test_a_value_that_a_callback_adds_is_a_number_and_no_text():
    adding = Adding()
    run = SimpleNamespace(callbacks=(adding,))
    values = {"loss": 1.0}
    call(run, "on_round", values)
    assert values == {"loss": 1.0, "mine": 2.0}
    adding.value = "two"
    with pytest.raises(ValueError, match="two"):
        call(run, "on_round", values)


def test_an_entry_point_that_makes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr("naign.training.callbacks.lookup", lambda *_: dict)
    with pytest.raises(InputError, match="'one' is a dict, not a Callback: fix the package"):
        find_callbacks("one")


def test_an_unknown_callback_is_refused():
    assert find_callbacks("") == find_callbacks("[]") == []
    with pytest.raises(InputError, match="train.callbacks is 'copies': none is built in, or install a package with"):
        find_callbacks("copies")
