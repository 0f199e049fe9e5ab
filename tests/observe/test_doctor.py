"""The doctor finds what would go wrong later; what it tries on a GPU is tried on the CPU."""

import pytest
import torch

from pipeline import philox
from pipeline.errors import InputError
from pipeline.observe import doctor
from pipeline.observe.doctor import examine, faiss, preflight, self_test

CPU = torch.device("cpu")


def test_this_machine_is_described_and_ready():
    examined = [*examine()]
    assert not [finding for finding in examined if finding["remedy"]]
    text = "\n".join(finding["text"] for finding in examined)
    assert "torch" in text and "FAISS: faiss-cpu" in text and "NCCL: " in text and "disk here" in text


@pytest.mark.parametrize(
    ("builds", "wanted"),
    [
        (["faiss-cpu 1.15.1"], ""),
        (["faiss-cpu 1.15.1", "faiss-gpu-cu12 1.12.0"], "pip uninstall -y faiss-cpu faiss-gpu-cu12"),
        ([], "pip install faiss-cpu"),
    ],
)
def test_one_build_of_faiss_is_wanted(monkeypatch, builds, wanted, tmp_path):
    monkeypatch.setattr(doctor, "faiss_builds", lambda: builds)
    ((_, remedy),) = faiss()
    assert bool(remedy) == bool(wanted) and wanted in remedy
    if len(builds) > 1:  # a run cannot tell which code it would search with
        with pytest.raises(InputError, match=wanted):
            preflight(str(tmp_path / "run"), "", 0)


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
