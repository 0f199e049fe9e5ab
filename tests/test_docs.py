"""The documentation builds, is short where it has to be, and names settings and files that exist."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from naign.config import Config, flatten
from naign.model.losses import OBJECTIVES
from naign.model.networks import NETWORKS
from naign.model.prior import PRIORS
from tests.conftest import ROOT

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def build(project: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of docs/, in a folder of its own."""
    shutil.copytree(ROOT / "docs", project / "docs", dirs_exist_ok=True, ignore=shutil.ignore_patterns("data", "runs"))
    shutil.copy(ROOT / "mkdocs.yml", project)
    for name in ("benchmarks", "configs", "k8s", "launch", "pipeline", "CONTRIBUTING.md"):
        (project / name).symlink_to(ROOT / name)
    command = [sys.executable, str(project / "docs/build_site.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_site_builds(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "build/site/benchmarks/results/points.png").exists()
    assert 'src="../benchmarks/results/points.png"' in (tmp_path / "build/site/imle/index.html").read_text()
    assert "Releasing" in (tmp_path / "build/site/index.html").read_text()
    assert json.loads((tmp_path / "build/site/search.json").read_text())["items"]


def test_the_site_is_refused_with_a_broken_link_or_a_page_outside_nav(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/new.md").write_text("[a](absent.md) [b](../benchmarks/absent.py) [c](data.md#absent)\n")
    built = build(tmp_path)
    assert built.returncode == 1
    for problem in ("absent.md", "benchmarks/absent.py", "#absent", "docs/new.md: not in nav"):
        assert problem in built.stderr


def test_the_settings_page_is_the_generated_one() -> None:
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs/settings.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert module.PAGE.read_text() == page, "run: make docs"
    assert not [key for key in flatten(Config()) if f"| `{key}` |" not in page]


@pytest.mark.parametrize("name", TOP)
def test_links_at_the_top_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    known = set(flatten(Config()))
    for section, choices in (("model", NETWORKS), ("objective", OBJECTIVES), ("prior", PRIORS)):
        known |= {f"{section}.{key}" for kind, _ in choices.values() for key in flatten(kind())}
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    named = re.findall(rf"--((?:{sections})(?:\.[a-z_-]+)+)", text)
    assert not [key for key in named if key.replace(".no-", ".") not in known]
    paths = re.findall(r"`((?:benchmarks|configs|docs|k8s|launch|pipeline|tests)/[\w./-]*\w)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
