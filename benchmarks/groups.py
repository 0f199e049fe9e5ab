"""What a match costs a rank does not grow with the number of ranks where images are matched in groups.

    python benchmarks/groups.py --to benchmarks/results/groups

Gloo ranks of one thread each on this machine, with the same number of images a rank, match rows of 784 values, as
`match_round` does in training: all images of a round together, in groups that two ranks share, and in groups that lie
within a rank. Bytes are those that loopback received, over the number of ranks. Seconds are the processor's, the median
of a rank's matches, while as many processes run in every line: four jobs of two ranks, two of four, or one of eight.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from output import ROOT, Record, megabytes, page, write
from torch import Tensor

from naign.errors import InputError, exit_on_input_error
from naign.match.matcher import MatchConfig, match_round

SHARE = 1024
"""Images a rank and round."""
DIMS = 784
PLANE = 16
"""Dimensions that the rows vary in."""
TIMES = 15
"""Matches measured."""
TITLES = ["images of a group", "ranks", "received a rank", "processor s", "peak memory"]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure groups."""

    to: Path = Path("benchmarks/results/groups")
    """Where to write, without an ending."""
    ranks: tuple[int, ...] = (2, 4, 8)
    """Numbers of ranks, each even."""


def rows_of(seed: int, count: int) -> Tensor:
    """Rows (count, DIMS) near a plane."""
    plane = torch.randn(PLANE, DIMS, generator=torch.Generator().manual_seed(0))
    return torch.randn(count, PLANE, generator=torch.Generator().manual_seed(seed)) @ plane


def received() -> int:
    """Bytes that loopback has received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.strip().partition(":")
        if name == "lo":
            return int(counts.split()[0])
    raise InputError("/proc/net/dev has no loopback")


def rank(group: int) -> None:
    """One of the ranks; the first prints its numbers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    world = dist.get_world_size()
    config = MatchConfig(round=SHARE * world, group=group, ratio=8)
    images = rows_of(dist.get_rank(), SHARE)

    def sample(ids: Tensor) -> Tensor:
        return rows_of(10**6 + int(ids[0]), len(ids))

    match_round(images, sample, config)  # connections are made
    dist.barrier()
    bytes_before = received()
    seconds = []
    for _ in range(TIMES):
        begun = time.process_time()
        match_round(images, sample, config)
        seconds.append(time.process_time() - begun)
    dist.barrier()
    if not dist.get_rank():
        found = {
            "bytes": (received() - bytes_before) / world / TIMES,
            "seconds": statistics.median(seconds),
            "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        print(json.dumps(found))
    dist.destroy_process_group()


def measured(group: int, ranks: int, most: int) -> Record:
    """One job alone for the bytes, and jobs of `most` ranks together for all else."""
    found = run(group, ranks)
    jobs = most // ranks
    with ThreadPoolExecutor(jobs) as threads:
        together = list(threads.map(run, [group] * jobs, [ranks] * jobs))
    found["seconds"] = statistics.mean(job["seconds"] for job in together)
    found["memory"] = max(job["memory"] for job in together)
    return found


def run(group: int, ranks: int) -> Record:
    """What the first rank of a job prints."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        __file__,
        f"--group={group}",
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT / "pipeline"))
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"{ranks} ranks failed: {done.stderr[-500:]}")
    return dict(json.loads(done.stdout))


def main(settings: Settings) -> None:
    found = {}
    lines = []
    for group in (0, 2 * SHARE, SHARE // 2):
        for ranks in settings.ranks:
            numbers = measured(group, ranks, max(settings.ranks))
            found[f"{group or 'all'}, {ranks}"] = numbers
            cells = [f"{group:,}" if group else "all of the round", str(ranks), megabytes(numbers["bytes"])]
            lines.append([*cells, f"{numbers['seconds']:.3f}", megabytes(numbers["memory"])])
    text = page(f"Matches of {SHARE:,} images a rank and eight times as many samples", TITLES, lines)
    write(settings.to, text, found)
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("groups"):
        if "--group" in sys.argv[-1]:
            rank(int(sys.argv[-1].partition("=")[2]))
        else:
            main(tyro.cli(Settings))
