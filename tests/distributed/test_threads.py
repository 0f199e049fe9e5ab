"""How many threads a rank has, and what is said where other programs have their cores."""

import re

import psutil
import pytest
import torch

from naign.distributed import host


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """A machine of four cores, of which this process may use 0, 1, 2 and 5."""
    before = torch.get_num_threads()
    monkeypatch.setattr(host, "_allowed_cores", lambda: {0, 1, 2, 5})
    monkeypatch.setattr(host.joblib, "cpu_count", lambda: 4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("asked", "local", "threads"), [(0, 1, 4), (0, 3, 1), (0, 9, 1), (3, 1, 3)])
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


@pytest.mark.parametrize(
    ("threads", "shares", "said"),
    [
        (4, [10, 10, 10, 100, 100, 10], ""),  # cores 3 and 4 are not ours
        (4, [100, 10, 10, 0, 0, 10], "keep 1.3 of 4 cores busy: .*--train.threads=3"),
        (4, [100, 100, 100, 0, 0, 100], "keep 4.0 of 4 cores busy: .*--train.threads=1"),
        (2, [100, 100, 0, 0, 0, 0], ""),
        (1, [100, 100, 100, 100, 100, 100], ""),
    ],
)
def test_a_crowded_machine_is_mentioned(threads, shares, said, monkeypatch, caplog):
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: shares)
    torch.set_num_threads(threads)
    host.warn_of_others()
    if said:
        [record] = caplog.records
        assert re.search(said, record.getMessage())
    else:
        assert not caplog.records
