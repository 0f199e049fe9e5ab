"""Real gloo ranks: the same match, the same errors on all, and no hang."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, environment

WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from tests.distributed import cases
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
dist.init_process_group("gloo")
result = getattr(cases, sys.argv[1])(rank, world)
torch.save(result, f"{sys.argv[2]}/rank{rank}.pt")
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def on_ranks(case: str, world: int, folder: Path) -> list[dict[str, object]]:
    """Run tests/distributed/cases.py:case(rank, world) on that many processes; what each returned."""
    folder.mkdir(exist_ok=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, case, str(folder)],
            env=environment(**address, RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["search", "near_duplicates", "uneven", "match"])
def test_the_match_is_the_same_on_every_world_size(case, tmp_path):
    (alone,) = on_ranks(case, 1, tmp_path / "1")
    for world in (2, 3):
        parts = on_ranks(case, world, tmp_path / str(world))
        for key in ("distances", "ids"):
            together = torch.cat([part[key] for part in parts])
            assert torch.equal(together, alone[key]), f"{case}: {key} on {world} ranks"


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_is_an_error_on_all(tmp_path):
    for part in on_ranks("refused", 2, tmp_path):
        assert part["nan"] == "nearest: NaN or infinity in the candidates of rank 1"
        assert part["none"] == "nearest: no rank has a candidate"


@pytest.mark.slow
def test_two_ranks_match_as_one_does_in_the_first_round_and_learn_as_well(train, digits, tmp_path):
    options = [f"--data.path={digits}", *SMALL, "--train.images=20000", "--checkpoint.rounds=100"]
    for ranks in (1, 2):
        done = train(f"--run.path=run{ranks}", f"--data.trace=trace{ranks}", *options, ranks=ranks, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"on {ranks} x cpu" in done.stdout + done.stderr
    reports = [
        [json.loads(line) for line in (tmp_path / f"run{ranks}" / "metrics.jsonl").read_text().splitlines()]
        for ranks in (1, 2)
    ]
    # Equal ids give equal distances; the sum over ranks differs in rounding alone.
    first = [report[0]["match/distance"] for report in reports]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    last = [sum(entry["loss/total"] for entry in report[-10:]) / 10 for report in reports]
    assert last[1] == pytest.approx(last[0], rel=0.02)
    images = [
        sorted(line for file in (tmp_path / f"trace{ranks}").iterdir() for line in file.read_text().splitlines())
        for ranks in (1, 2)
    ]
    assert images[0] == images[1] and len(images[0]) == 79 * 256
