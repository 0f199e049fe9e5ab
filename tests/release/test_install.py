"""What cannot be installed is refused in one line before anything is written; the files suit other file systems."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OLD = "sys.version_info = (3, 10, 9)"
BARE = "sys.modules['ensurepip'] = None"
FULL = "import shutil; shutil.disk_usage = lambda place: type('', (), {'free': 3e8})"


def make(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ)
    for name in os.environ:
        if name.startswith("MAKE"):  # of a make that runs tests
            del env[name]
    done = subprocess.run(
        ["make", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (OLD, r"Python 3\.11 or newer is needed, and \S+/python is 3\.10: make PYTHON=python3\.12 \.\.\."),
        (BARE, r"\S+/python cannot make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv"),
        (
            FULL,
            r"\S+ has 0\.3 GB free, and an installation needs \d+, .*: make VENV=/elsewhere/\.venv \.\.\.",
        ),
    ],
)
def test_make_refuses_before_anything_is_written(fault: str, problem: str, tmp_path: Path) -> None:
    """By a Python with a fault, which would make the environment otherwise."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ntest "$1" = -c && exec {sys.executable} -c "import sys; {fault}\n$2"\nmkdir -p "$3"\n'
    )
    python.chmod(0o755)
    done = make("train", f"PYTHON={python}", f"VENV={tmp_path}/deep/venv", code=2)
    first, last = done.stderr.splitlines()
    assert re.fullmatch(problem, first)
    assert last.startswith("make: ***")
    assert not done.stdout
    assert list(tmp_path.iterdir()) == [python]


def test_an_environment_that_was_not_finished_does_not_stay(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntest "$1" = -c && exec {sys.executable} "$@"\nmkdir -p "$3/bin"; exit 1\n')
    python.chmod(0o755)
    make("train", f"PYTHON={python}", f"VENV={tmp_path}/venv", code=2)
    assert list(tmp_path.iterdir()) == [python]


def test_a_run_and_a_recipe_may_have_spaces_in_their_paths() -> None:
    said = make("--dry-run", "train", "RUN=runs/a b", "CONFIG=my recipes/c.yaml").stdout
    assert '--config "my recipes/c.yaml" --run.path "runs/a b"' in said
    assert 'naign evaluate "runs/a b"' in said


def test_models_are_checked_before_the_first_is_trained() -> None:
    problems = {"": "MODELS is empty", "mnist nothere": "No rule to make target 'configs/nothere.yaml'"}
    for models, problem in problems.items():
        done = make("--dry-run", "models", f"MODELS={models}", code=2)
        assert problem in done.stderr
        assert "launch" not in done.stdout


def test_a_broken_tar_of_a_model_is_not_published() -> None:
    *_, tar, move, _ = make("--dry-run", "models", "MODELS=mnist").stdout.splitlines()
    assert ".tar.partial" in tar
    assert re.fullmatch("mv .*/mnist.tar", move)


def test_names_of_files_suit_every_file_system() -> None:
    """No two differ in case alone (macOS), none has a character or length that Windows refuses."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[\w./-]{1,150}", name, re.ASCII)
