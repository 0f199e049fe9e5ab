"""The wheel trains and measures where there is no checkout, and its version is that of git's newest tag."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, environment

WHERE = """
import importlib.util
import naign
from naign import shipped
assert importlib.util.find_spec("pipeline") is None
print(naign.__file__, naign.__version__, shipped("launch/zero2.yaml"), shipped("pipeline/train.py"))
"""

READ = """
from naign import NAIGN, nearest, open_dataset
images, labels, keys = next(iter(open_dataset("data/digits", batch=100)))
repaired = NAIGN.from_pretrained("runs/digits").project(images).flatten(1)
distances, ids = nearest(repaired, repaired, first_id=5)
print(ids.tolist() == list(range(5, 105)), len(set(keys)), labels.dtype)
"""


def run(folder: Path, *command: str, code: int = 0, **more: str) -> str:
    """Run a program that does not see this checkout. Returns what it said."""
    env = environment() | {"PYTHONPATH": ""} | more
    for name in list(env):
        if name.startswith(("GIT_", "SETUPTOOLS_SCM")):
            del env[name]
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the files of this checkout, one commit with the tag v7.8.9."""
    folder = tmp_path_factory.mktemp("tagged")
    listed = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in listed.split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git"]
    for setting in ("user.name=test", "user.email=test@localhost", "commit.gpgSign=false"):
        git += ["-c", setting]
    run(folder, *git, "init", "--quiet")
    run(folder, *git, "add", ".")
    run(folder, *git, "commit", "--quiet", "--message=all")
    run(folder, *git, "tag", "--annotate", "v7.8.9", "--message=7.8.9")
    return folder


def files_of(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*")}


@pytest.mark.slow
def test_the_wheel_trains_and_measures_in_an_empty_folder(tagged: Path, tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    site = tmp_path / "site"
    empty = tmp_path / "empty"
    python_m = [sys.executable, "-m"]
    run(tagged, *python_m, "build", "--no-isolation", "--outdir", str(dist))  # the wheel from the archive
    wheel = dist / "naign-7.8.9-py3-none-any.whl"
    archive = dist / "naign-7.8.9.tar.gz"
    assert sorted(dist.iterdir()) == [wheel, archive]
    with tarfile.open(archive) as opened:
        assert {"naign-7.8.9/tests/conftest.py", "naign-7.8.9/k8s/job.yaml"} <= set(opened.getnames())
    install = ["install", "-q", "--no-deps", "--no-compile", "--target", str(site)]
    run(tmp_path, *python_m, "pip", *install, str(wheel))
    for folder in ("configs", "launch", "k8s", "models"):
        assert files_of(site / "naign" / folder) == files_of(ROOT / folder)

    empty.mkdir()

    def python(*options: str) -> str:
        return run(empty, sys.executable, *options, PYTHONPATH=str(site))

    where = python("-c", WHERE).split()
    inside = site / "naign"
    files = [str(inside / name) for name in ("launch/zero2.yaml", "pipeline/train.py")]
    assert where == [str(inside / "__init__.py"), "7.8.9", *files]
    assert (inside / "py.typed").exists()
    assert not (site / "pipeline").exists()
    small = [option for option in SMALL if not option.startswith("--report")]
    said = python(str(site / "bin/naign"), "train", "--config", "digits", *small, "--train.images=512")
    assert "packing it" in said
    assert "done: the run lies in runs/digits" in said
    python(str(site / "bin/naign"), "evaluate", "runs/digits", "--samples", "100")
    metrics = json.loads((empty / "runs/digits/evaluation/metrics.json").read_text())
    assert metrics["encoder"] == "digits-cnn64"
    assert metrics["images_seen"] == 512
    assert python("-c", READ).split() == ["True", "100", "torch.int64"]


def test_an_archive_without_gits_history_has_a_version(tagged: Path, tmp_path: Path) -> None:
    """As `git archive` makes it, its tag's; as copied files, that of pyproject.toml."""
    version = (sys.executable, "-m", "setuptools_scm")
    run(tagged, "git", "archive", "--output", str(tmp_path / "all.tar"), "HEAD")
    with tarfile.open(tmp_path / "all.tar") as opened:
        opened.extractall(tmp_path / "archive", filter="data")
    assert run(tmp_path / "archive", *version).split()[-1] == "7.8.9"
    (tmp_path / "archive/.git_archival.txt").unlink()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    fallback = project["tool"]["setuptools_scm"]["fallback_version"]
    assert run(tmp_path / "archive", *version).split()[-1] == fallback
    assert f"\n## [{fallback}]" in (ROOT / "CHANGELOG.md").read_text()
    assert os.access(tmp_path / "archive/.ci/run", os.X_OK)


@pytest.mark.slow
def test_a_clone_that_is_installed_in_place_is_found_beside_it(tagged: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(tagged, tmp_path / "naign")
    site = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
    run(tmp_path, sys.executable, "-m", "pip", "install", *options, "--editable", str(clone))
    # -S: without the packages of this environment, which may have an installation in place as well.
    program = f"import site; site.addsitedir({str(site)!r}); import naign; print(naign.__file__)"
    assert run(tmp_path, sys.executable, "-S", "-c", program).strip() == str(clone / "pipeline/naign/__init__.py")
