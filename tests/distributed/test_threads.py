"""How many threads a rank has."""

import pytest
import torch

from naign.distributed import host


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(host.joblib, "cpu_count", lambda: 4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "local", "threads"),
    [
        (0, 1, 4),
        (0, 3, 1),
        (0, 9, 1),
        (3, 1, 3),
    ],
)
def test_cores_are_shared_among_ranks(asked, local, threads, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    host.set_threads(asked)
    assert torch.get_num_threads() == threads


def test_a_containers_quota_is_heeded(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("joblib.externals.loky.backend.context._cpu_count_cgroup", lambda count: 1)
    monkeypatch.setenv("RANK", "0")
    host.set_threads(0)
    assert torch.get_num_threads() == 1


def test_without_a_launcher_the_environment_is_heeded(monkeypatch):
    for name in ("RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)  # as torch does where it is imported under that
    host.set_threads(0)
    assert torch.get_num_threads() == 2
    host.set_threads(3)
    assert torch.get_num_threads() == 3
