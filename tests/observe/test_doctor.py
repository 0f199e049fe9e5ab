"""The doctor describes a machine, and finds builds of FAISS that damage each other."""

import importlib
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

from naign.distributed.host import faiss_builds, why_no_faiss
from naign.match.exact import load_faiss
from naign.observe.doctor import examine, preflight
from tests.refused import refused

ROOT = Path(__file__).parents[2]
FAISS_VERSION = runpy.run_path(f"{ROOT}/launch/faiss-gpu/which.py")["VERSION"]


def test_this_machine_is_described_and_ready():
    examined = dict(examine())
    assert not any(examined.values())
    text = "\n".join(examined)
    for part in ("torch", "cores", "of memory", "train.precision=auto is", "FAISS: faiss-cpu", "disk here"):
        assert part in text


@pytest.fixture
def site(monkeypatch, tmp_path):
    """Installs distributions of FAISS, by name and version, into a folder that precedes all others on the path."""
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def install(*builds):
        (tmp_path / "faiss").mkdir()
        (tmp_path / "faiss/__init__.py").write_text("raise RuntimeError('libcublas.so.12 is missing')")
        for build in builds:
            name, version = build.split()
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
            record = f"{info.name}/METADATA,,\n"
            if "+" not in version:
                record += "faiss/__init__.py,,\n"
            (info / "RECORD").write_text(record)
        importlib.invalidate_caches()
        return tmp_path

    return install


@pytest.mark.parametrize(
    "builds, shown",
    [
        (["faiss-cpu 1.15.1"], "faiss-cpu 1.15.1"),
        (["faiss-cpu 1.15.1+gpu", "faiss-gpu 1.15.1"], "faiss-gpu 1.15.1"),  # launch/faiss-gpu holds the name
        (["faiss-cpu 1.15.1", "faiss-haystack 3.0.0+0"], "faiss-cpu 1.15.1"),  # uses FAISS, and does not bring it
    ],
)
def test_one_build_of_faiss_is_fine(builds, shown, site):
    site(*builds)
    assert faiss_builds() == [shown]
    assert why_no_faiss() == ""


def test_two_builds_of_faiss_are_refused(site, tmp_path):
    site("faiss-cpu 1.15.1", "faiss-gpu 1.15.1")
    remedy = "pip uninstall -y faiss-cpu faiss-gpu faiss-gpu-cuvs, then pip install faiss-cpu, or"
    found = dict(examine())
    assert remedy in found["FAISS: faiss-cpu 1.15.1, faiss-gpu 1.15.1"]
    with refused(remedy):
        preflight(f"{tmp_path}/run", "", 0)
    with refused(remedy):
        load_faiss.__wrapped__()


def test_a_build_of_faiss_that_lost_files(site, monkeypatch):
    folder = site("faiss-cpu 1.15.1+gpu", "faiss-gpu 1.15.1")
    with refused(r"FAISS cannot be loaded: libcublas.so.12 is missing: `naign doctor`"):
        load_faiss.__wrapped__()
    (folder / "faiss/__init__.py").unlink()  # as if the other of two builds had been uninstalled
    monkeypatch.setattr(sys, "path", [str(folder)])
    with refused("FAISS is missing: pip uninstall -y faiss-cpu faiss-gpu faiss-gpu-cuvs, then"):
        load_faiss.__wrapped__()


def test_the_name_that_is_held_has_the_pinned_version():
    held = tomllib.loads((ROOT / "launch/faiss-gpu/pyproject.toml").read_text())["project"]
    assert held["name"] == "faiss-cpu"
    assert held["version"] == f"{FAISS_VERSION}+gpu"
    assert f"\nfaiss-cpu=={FAISS_VERSION} " in (ROOT / "launch/constraints.txt").read_text()
