"""The documentation builds, and names settings and files that exist."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from naign.config import Config, flatten
from naign.model.losses import OBJECTIVES
from naign.model.networks import NETWORKS
from naign.model.prior import PRIORS
from tests.conftest import ROOT
from tests.programs import script, succeeded

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CHOICES = {"model": NETWORKS, "objective": OBJECTIVES, "prior": PRIORS}
SHOWN = {"model.hidden", "objective.delta", "prior.directions"}
"""Settings of the package that docs/extend.md shows."""


def build(project):
    """Build the site of a copy of docs/, in a folder of its own."""
    ignored = shutil.ignore_patterns("data", "runs")
    shutil.copytree(ROOT / "docs", project / "docs", dirs_exist_ok=True, ignore=ignored)
    shutil.copy(ROOT / "mkdocs.yml", project)
    for name in ("benchmarks", "configs", "k8s", "launch", "pipeline", "CONTRIBUTING.md"):
        (project / name).symlink_to(ROOT / name)
    command = [sys.executable, str(project / "docs/build_site.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_site_builds(tmp_path):
    succeeded(build(tmp_path))
    site = tmp_path / "build/site"
    assert (site / "benchmarks/results/points.png").exists()
    assert 'src="../benchmarks/results/points.png"' in (site / "imle/index.html").read_text()
    assert "Extending" in (site / "index.html").read_text()
    assert json.loads((site / "search.json").read_text())["items"]


def test_the_site_is_refused_with_a_broken_link_or_a_page_outside_nav(tmp_path):
    (tmp_path / "docs").mkdir()
    links = "[a](absent.md) [b](../benchmarks/absent.py) [c](data.md#absent)\n"
    (tmp_path / "docs/new.md").write_text(links)
    built = build(tmp_path)
    assert built.returncode == 1
    for problem in ("absent.md", "benchmarks/absent.py", "#absent", "docs/new.md: not in nav"):
        assert problem in built.stderr


def test_the_settings_page_is_the_generated_one():
    module = script("docs/settings.py")
    page = module.page()
    assert module.PAGE.read_text() == page, "run: make docs"
    for key in flatten(Config()):
        assert f"| `{key}` |" in page


@pytest.mark.parametrize("name", TOP)
def test_links_at_the_top_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
        assert "://" in link or (ROOT / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_files_of_a_page_exist(page):
    text = page.read_text()
    known = SHOWN | set(flatten(Config()))
    for section, choices in CHOICES.items():
        for kind, _ in choices.values():
            known |= {f"{section}.{key}" for key in flatten(kind())}
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    for key in re.findall(rf"--((?:{sections})(?:\.[a-z_-]+)+)", text):
        assert key.replace(".no-", ".") in known
    for path in re.findall(r"`((?:benchmarks|configs|docs|k8s|launch|pipeline|tests)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists(), path
