"""A run that changes its number of ranks ends as one that does not.

    python benchmarks/resize.py --to benchmarks/results/resize

A run on the digits begins with 2 ranks, is stopped by SIGTERM after a quarter of its rounds, and continues with 1, then
3, then 2 to its end: once as DDP over gloo, once as DeepSpeed ZeRO-2. Compared in the same run: the same training on 2
ranks that is never stopped, with several seeds, whose spread is what a seed makes. The table has the means of the last
tenth of the rounds.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro
from output import ROOT, Record, page, write

WORLDS = (2, 1, 3, 2)
ROUND = 768
NAMES = ("loss/total", "loss/reconstruction", "loss/imle", "match/distance")
OPTIONS = (
    f"--match.round={ROUND}",
    "--match.ratio=4",
    "--train.batch=48",
    "--train.threads=1",
    "--model.width=16",
    "--model.code=32",
    "--report.pictures=0",
)


@dataclass(kw_only=True, slots=True)
class Settings:
    """Compare resized runs with one that is not."""

    to: Path = Path("benchmarks/results/resize")
    """Where to write, without an ending."""
    rounds: int = 60
    """Of a run."""
    seeds: int = 3
    """Of the run that is never stopped."""


def start(
    engine: str,
    world: int,
    folder: Path,
    rounds: int,
    seed: int,
) -> "subprocess.Popen[bytes]":
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port=0"]
    launcher += ["--config_file", str(ROOT / f"launch/{engine}.yaml"), "--num_processes", str(world)]
    command = [*launcher, str(ROOT / "pipeline/train.py"), *OPTIONS]
    command += [f"--data.path={folder.parent / 'digits'}", f"--run.path={folder}"]
    command += [f"--train.images={rounds * ROUND}", f"--seed={seed}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def reported(folder: Path) -> list[Record]:
    """The metrics of each round so far."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(
    engine: str,
    world: int,
    folder: Path,
    rounds: int,
    seed: int,
    until: int,
) -> None:
    """Train until so many rounds are reported, then send SIGTERM to the ranks."""
    with start(engine, world, folder, rounds, seed) as job:
        while job.poll() is None and len(reported(folder)) < until:
            time.sleep(0.02)
        if until < rounds:
            children = ["pgrep", "-P", str(job.pid)]
            found = subprocess.run(children, capture_output=True, text=True, check=False)
            ranks = found.stdout.split()
            for pid in ranks or [str(job.pid)]:
                subprocess.run(["kill", f"-{signal.SIGTERM.value}", pid], check=False)
        _, errors = job.communicate(timeout=300)
    if until >= rounds and job.returncode:
        raise RuntimeError(errors.decode()[-3000:])


def main(settings: Settings) -> None:
    rounds = settings.rounds
    found: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        pack = [sys.executable, "-m", "naign.cli", "pack", "digits", "--to", f"{scratch}/digits"]
        subprocess.run(pack, check=True)
        for seed in range(settings.seeds):
            folder = Path(scratch) / f"seed{seed}"
            run("cpu", 2, folder, rounds, seed, until=rounds)
            found[f"2 ranks, DDP, seed {seed}"] = reported(folder)
        for engine, title in (("cpu", "DDP"), ("zero2", "ZeRO-2")):
            folder = Path(scratch) / engine
            for part, world in enumerate(WORLDS, 1):
                until = rounds * part // len(WORLDS)
                run(engine, world, folder, rounds, seed=0, until=until)
            found[f"2, 1, 3, 2 ranks, {title}, seed 0"] = reported(folder)
    rows = []
    last = max(1, rounds // 10)
    for name, lines in found.items():
        numbers = [line["round"] for line in lines]
        if numbers != list(range(rounds)):
            raise RuntimeError(f"{name}: a round is missing, or reported twice")
        cells = []
        for key in NAMES:
            values = [line[key] for line in lines[-last:]]
            cells.append(f"{fmean(values):.4f}")
        rows.append([name, *cells])
    text = page(f"Means of the last {last} of {rounds} rounds", ["run", *NAMES], rows)
    print(text)
    write(settings.to, text, found)


if __name__ == "__main__":
    main(tyro.cli(Settings))
