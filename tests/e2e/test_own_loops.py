"""Programs of others that read by `naign.open_dataset`: stopped within an epoch, resumed on another number of ranks."""

import shutil
import sys

import pytest
import torch

from naign import open_dataset
from tests.conftest import ROOT
from tests.programs import execute, succeeded

pytestmark = pytest.mark.slow

IMAGES, STOP = 1438, 5


def run(program, ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "tests/e2e" / program), *map(str, arguments)]
    succeeded(execute(command))


def lines(folder):
    return [line for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


@pytest.fixture
def folders(tmp_path):
    for name in ("before", "1", "2"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_plain_loop_is_resumed_by_one_and_by_two_ranks(digits, folders):
    run("plain_loop.py", 2, digits, folders / "state.pt", folders / "before", STOP)
    state = torch.load(folders / "state.pt")
    assert (state["epoch"], state["position"]) == (0, 90 * STOP)
    before = lines(folders / "before")
    keys_before = [line.split()[0] for line in before]
    whole = []
    for batch in open_dataset(digits, batch=90, seed=3, flip=True):
        whole += batch.keys
    assert len(before) == 90 * STOP
    for ranks in (1, 2):
        shutil.copy(folders / "state.pt", folders / f"state-{ranks}.pt")
        run("plain_loop.py", ranks, digits, folders / f"state-{ranks}.pt", folders / str(ranks))
        assert torch.load(folders / f"state-{ranks}.pt") == {**state, "epoch": 1, "position": 0}
        keys = keys_before + [line.split()[0] for line in lines(folders / str(ranks))]
        assert len(keys) == IMAGES and sorted(keys) == sorted(whole)
    # The images are those of one rank, mirrored alike.
    assert set(keys_before) == set(whole[: 90 * STOP])
    assert sorted(lines(folders / "1")) == sorted(lines(folders / "2"))


def test_accelerates_own_loader_is_resumed_by_one_and_by_two_ranks(digits, folders):
    pytest.importorskip("torchdata")
    run("accelerate_loop.py", 2, digits, folders / "state", folders / "before", STOP)
    before = lines(folders / "before")
    assert len(before) == 90 * STOP
    for ranks in (1, 2):
        run("accelerate_loop.py", ranks, digits, folders / "state", folders / str(ranks))
        keys = before + lines(folders / str(ranks))
        assert len(keys) == len(set(keys)) == IMAGES
