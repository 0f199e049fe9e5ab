"""The workflows of .github are valid and pinned, run what the Makefile has, and may do no more than they must."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
WRITES = {
    ("docs", "publish"): {"pages", "id-token"},
    ("image", "build"): {"packages"},
    ("release", "pypi"): {"id-token"},
    ("release", "github"): {"contents"},
    ("release", "image"): {"packages"},
}
"""What a job may write, by workflow and job; the others only read."""


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())["jobs"]
    return found


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Check files against one of the schemas that check-jsonschema ships."""
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", f"vendor.{schema}", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_workflows_are_valid_and_a_wrong_one_is_found(tmp_path: Path) -> None:
    assert {file.stem for file in FILES} == {"test", "lowest", "docs", "image", "release"}
    done = check("github-workflows", *FILES)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(FILES[0].read_text().replace("runs-on", "run-on"))
    assert check("github-workflows", wrong).returncode == 1


def test_forms_of_issues_and_the_citation_are_valid() -> None:
    templates = ROOT / ".github/ISSUE_TEMPLATE"
    forms = sorted(set(templates.glob("*.yml")) - {templates / "config.yml"})
    assert [form.stem for form in forms] == ["bug", "question"]
    schemas = {
        "github-issue-forms": forms,
        "github-issue-config": [templates / "config.yml"],
        "citation-file-format": [ROOT / "CITATION.cff"],
    }
    for schema, files in schemas.items():
        done = check(schema, *files)
        assert done.returncode == 0, done.stdout


def test_the_build_of_the_image_is_sent_what_it_copies() -> None:
    """.dockerignore leaves out everything that it does not name."""
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    names = set()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.M):
        names |= {source.partition("/")[0] for source in sources.split()}
    assert {"pipeline", "configs"} <= names
    assert names <= set(kept)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflows_run_what_the_makefile_has_and_can_write_only_what_they_must(file: Path) -> None:
    text = file.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= set(targets)
    assert "secrets." not in text
    used = re.findall(r"uses: (.*)", text)
    assert used
    for each in used:
        assert re.fullmatch(r"\./\.github/workflows/\w+\.yml|[\w/-]+@[0-9a-f]{40} # v[\d.]+", each)
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    for name, job in jobs(file).items():
        rights = job.get("permissions", {})
        writes = {right for right, how in rights.items() if how == "write"}
        assert writes == WRITES.get((file.stem, name), set())
        for step in job.get("steps", []):  # ${{ }} in a command would run what it holds
            assert "${{" not in step.get("run", "")
            assert "checkout" not in step.get("uses", "") or step["with"]["persist-credentials"] is False


def test_all_that_an_extra_asks_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = re.findall(r"^([\w.-]+)==\S+", (ROOT / "launch/constraints.txt").read_text(), re.M)
    names = set()
    for asked in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in asked:
            name = re.findall(r"[\w.-]+", requirement)[0]
            names.add(name.lower().replace("_", "-"))
    assert names - set(pins) == {"torch"}, "make constraints"
