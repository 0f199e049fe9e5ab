"""What `naign doctor` tries on a GPU, tried on the CPU."""

import pytest
import torch

from pipeline import philox
from pipeline.observe import self_test as module
from pipeline.observe.self_test import ring, self_test

CPU = torch.device("cpu")


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
    monkeypatch.setattr(module, "convolve", noisy)
    remedies = [remedy for _, remedy in self_test(CPU)]
    assert all(remedies[:3]) and "cannot be trusted" in remedies[0] and "repeat their bits" in remedies[2]


@pytest.mark.slow
def test_ranks_sum_over_their_devices():
    [(text, remedy)] = ring("gloo", 2, values=1000)
    assert text.startswith("gloo on 2 devices sums 0 MB right, at ") and not remedy


def test_ranks_that_cannot_sum_are_named(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Traceback ...\nncclSystemError: no socket")

    monkeypatch.setattr(module, "spawn", fail)
    [(text, remedy)] = ring("nccl", 2)
    assert text == "nccl on 2 devices fails: ncclSystemError: no socket" and "NCCL_DEBUG=INFO" in remedy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_is_sound():
    assert not any(remedy for _, remedy in self_test(torch.device("cuda")))
