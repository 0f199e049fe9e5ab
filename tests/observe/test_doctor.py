"""The doctor finds what would go wrong later; what it tries on a GPU is tried on the CPU."""

import importlib
import runpy
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch

from naign import philox
from naign.errors import InputError
from naign.match.exact import load_faiss
from naign.observe import doctor
from naign.observe.doctor import examine, faiss, preflight, self_test

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
FAISS_VERSION = runpy.run_path(str(ROOT / "launch/faiss-gpu/which.py"))["VERSION"]


def test_this_machine_is_described_and_ready():
    examined = [*examine()]
    assert not [finding for finding in examined if finding["remedy"]]
    text = "\n".join(finding["text"] for finding in examined)
    assert "torch" in text and "FAISS: faiss-cpu" in text and "NCCL: " in text and "disk here" in text


@pytest.fixture
def site(monkeypatch, tmp_path):
    """Installs distributions of FAISS, by name and version, into a folder that precedes all others on the path."""
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def install(*builds: str) -> Path:
        for build in builds:
            name, version = build.split()
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
            (info / "RECORD").write_text(f"{info.name}/METADATA,,\n" + "faiss/__init__.py,,\n" * ("+" not in version))
            (tmp_path / "faiss").mkdir(exist_ok=True)
            (tmp_path / "faiss/__init__.py").write_text("raise RuntimeError('libcublas.so.12 is missing')")
        importlib.invalidate_caches()
        return tmp_path

    return install


@pytest.mark.parametrize(
    ("builds", "wanted"),
    [
        (["faiss-cpu 1.15.1"], ""),
        (["faiss-cpu 1.15.1+gpu", "faiss-gpu 1.15.1"], ""),  # launch/faiss-gpu holds the name
        (["faiss-cpu 1.15.1", "faiss-haystack 3.0.0+0"], ""),  # uses FAISS, and brings none
        (
            ["faiss-cpu 1.15.1", "faiss-gpu 1.15.1"],
            "pip uninstall -y faiss-cpu faiss-gpu, then pip install faiss-cpu, or",
        ),
    ],
)
def test_one_build_of_faiss_is_wanted(builds, wanted, site, tmp_path):
    site(*builds)
    ((text, remedy),) = faiss()
    assert text == f"FAISS: {', '.join(build for build in builds if '+' not in build)}"
    assert bool(remedy) == bool(wanted) and wanted in remedy
    if wanted:
        for refuse in (partial(preflight, str(tmp_path / "run"), "", 0), load_faiss.__wrapped__):
            with pytest.raises(InputError, match=wanted):
                refuse()


def test_a_build_of_faiss_that_lost_files(site, monkeypatch):
    folder = site("faiss-cpu 1.15.1+gpu", "faiss-gpu 1.15.1")
    with pytest.raises(InputError, match=r"FAISS cannot be loaded: libcublas.so.12 is missing: `naign doctor`"):
        load_faiss.__wrapped__()
    (folder / "faiss/__init__.py").unlink()  # as if the other of two builds had been uninstalled
    monkeypatch.setattr(sys, "path", [str(folder)])
    with pytest.raises(InputError, match="FAISS is missing: pip uninstall -y faiss-cpu faiss-gpu, then"):
        load_faiss.__wrapped__()


@pytest.mark.parametrize(
    ("cuda", "fitting"),
    [(None, ""), ("11.8", ""), ("12.6", "faiss-gpu"), ("13.0", "faiss-gpu"), ("13.2", "faiss-gpu-cuvs"), ("14.0", "")],
)
def test_the_build_that_fits_cuda_is_named(cuda, fitting, monkeypatch, site):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    site("faiss-cpu 1.15.1")
    hint = f"; {fitting} {FAISS_VERSION} fits CUDA {cuda} (docs/gpus.md)" if fitting else ""
    assert [*faiss()] == [(f"FAISS: faiss-cpu 1.15.1{hint}", "")]


def test_the_name_that_is_held_has_the_pinned_version():
    held = tomllib.loads((ROOT / "launch/faiss-gpu/pyproject.toml").read_text())["project"]
    assert (held["name"], held["version"]) == ("faiss-cpu", f"{FAISS_VERSION}+gpu")
    assert f"\nfaiss-cpu=={FAISS_VERSION} " in (ROOT / "launch/constraints.txt").read_text()


def test_a_sound_device_has_nothing_to_be_done_about_it():
    lines = list(self_test(CPU))
    assert len(lines) == 3 and not any(remedy for _, remedy in lines)
    assert lines[0][0] == "random numbers other than the CPU's: 0 of 15360"
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_numbers_are_named(monkeypatch):
    drawn, calls = philox.uniform, []

    def off(*key):
        calls.append(key)
        return drawn(*key) + (len(calls) > 1) * 1e-3

    def noisy(images, weights):
        return [value + torch.randn(()) * value for value in (images, weights, images)]

    monkeypatch.setattr(philox, "uniform", off)
    monkeypatch.setattr(doctor, "convolve", noisy)
    remedies = [remedy for _, remedy in self_test(CPU)]
    assert all(remedies[:3]) and "cannot be trusted" in remedies[0] and "repeat their bits" in remedies[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_is_sound():
    assert not any(remedy for _, remedy in self_test(torch.device("cuda")))
