"""A run on any number of ranks, one that changes it, and one that is killed learn alike.

    python benchmarks/resize.py --to benchmarks/results/resize

Trainings on the digits, by gloo: on 1, 2 and 4 ranks; on 2 ranks that are killed half-way and start again; on 2 ranks
that are stopped by SIGTERM after a quarter of the rounds, and continue with 1, then 3, then 2, once as DDP and once as
DeepSpeed ZeRO-2. Compared in the same run: 2 ranks that are never stopped, with several seeds, whose spread is
what a seed makes. The table has the means of the last tenth of the rounds; docs/ranks.svg is drawn of all rounds.
"""

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro
from cost import framed, line, text
from output import ROOT, Record, page, write

WORLDS = (2, 1, 3, 2)
ROUND = 768
NAMES = ("loss/total", "loss/reconstruction", "loss/imle", "match/distance")
KILLED = "2 ranks, killed, resumed"
CURVES = {
    "1 rank": ("#f2a65a", 11),
    "2 ranks, DDP, seed 0": ("#2d6cdf", 7),
    "4 ranks": ("#7ad0a3", 4),
    KILLED: ("#d1242f", 1.5),
    "2 ranks, DDP, seed 1": ("#8c959f", 1.5),
}
"""Colour and width of the curves of docs/ranks.svg, the lowest first."""
WIDTH, HEIGHT, LEFT = 560, 250, 50
OPTIONS = (
    f"--match.round={ROUND}",
    "--match.ratio=4",
    "--train.batch=48",
    "--train.threads=1",
    "--model.width=16",
    "--model.code=32",
    "--prior.name=none",
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
    stop: signal.Signals = signal.SIGTERM,
) -> None:
    """Train until so many rounds are reported, then send a signal to the ranks."""
    with start(engine, world, folder, rounds, seed) as job:
        while job.poll() is None and len(reported(folder)) < until:
            time.sleep(0.02)
        if until < rounds:
            children = ["pgrep", "-P", str(job.pid)]
            found = subprocess.run(children, capture_output=True, text=True, check=False)
            ranks = found.stdout.split()
            for pid in ranks or [str(job.pid)]:
                subprocess.run(["kill", f"-{stop.value}", pid], check=False)
        _, errors = job.communicate(timeout=300)
    if until >= rounds and job.returncode:
        raise RuntimeError(errors.decode()[-3000:])


def picture(found: dict[str, list[Record]]) -> str:
    """The losses of CURVES by round, on a logarithmic axis, as SVG."""
    parts = []
    high = max(losses(found, name)[1] for name in CURVES)  # the first round's loss would leave no room for the others
    low = min(min(losses(found, name)) for name in CURVES)
    for loss in (0.6, 1, 2):
        y = down(loss, low, high)
        parts.append(line(LEFT, y, WIDTH - 12, y, "grid"))
        parts.append(text(LEFT - 8, y + 5, f"{loss}", "", "end"))
    for place, (name, (colour, width)) in enumerate(CURVES.items()):
        values = losses(found, name)
        step = (WIDTH - LEFT - 12) / (len(values) - 1)
        points = " ".join(f"{LEFT + step * x:.1f},{down(loss, low, high):.1f}" for x, loss in enumerate(values) if x)
        stroke = f'fill="none" stroke="{colour}" stroke-width="{width}"'
        parts.append(f'<polyline points="{points}" {stroke}/>')
        y = 32 + 24 * place
        parts.append(f'<path d="M300 {y - 5}H340" {stroke}/>')
        parts.append(text(352, y, name.replace(", DDP", ""), "name"))
    parts.append(text(WIDTH - 12, HEIGHT - 10, "loss by round, logarithmic", "", "end"))
    return framed(WIDTH, HEIGHT, "Loss by round, on 1, 2 and 4 ranks, and of a run that was killed", parts)


def losses(found: dict[str, list[Record]], name: str) -> list[float]:
    return [record["loss/total"] for record in found[name]]


def down(loss: float, low: float, high: float) -> float:
    share = math.log(high / loss) / math.log(high / low)
    return 14 + share * (HEIGHT - 44)


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
        for name, world in (("1 rank", 1), ("4 ranks", 4)):
            folder = Path(scratch) / name
            run("cpu", world, folder, rounds, seed=0, until=rounds)
            found[name] = reported(folder)
        folder = Path(scratch) / "killed"
        run("cpu", 2, folder, rounds, seed=0, until=rounds // 2, stop=signal.SIGKILL)
        run("cpu", 2, folder, rounds, seed=0, until=rounds)
        found[KILLED] = reported(folder)
        for engine, title in (("cpu", "DDP"), ("zero2", "ZeRO-2")):
            folder = Path(scratch) / engine
            for part, world in enumerate(WORLDS, 1):
                until = rounds * part // len(WORLDS)
                run(engine, world, folder, rounds, seed=0, until=until)
            found[f"2, 1, 3, 2 ranks, {title}, seed 0"] = reported(folder)
    rows = []
    last = max(1, rounds // 10)
    for name, lines in found.items():
        numbers = [record["round"] for record in lines]
        if numbers != list(range(rounds)):
            raise RuntimeError(f"{name}: a round is missing, or reported twice")
        found[name] = [{key: record[key] for key in NAMES} for record in lines]
        cells = []
        for key in NAMES:
            values = [record[key] for record in lines[-last:]]
            cells.append(f"{fmean(values):.4f}")
        rows.append([name, *cells])
    table = page(f"Means of the last {last} of {rounds} rounds", ["run", *NAMES], rows)
    print(table)
    write(settings.to, table, found)
    if settings.to == Settings().to:
        (ROOT / "docs/ranks.svg").write_text(picture(found))


if __name__ == "__main__":
    main(tyro.cli(Settings))
