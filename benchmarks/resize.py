"""Does a run that changes its number of ranks end as one that does not?

    python benchmarks/resize.py --to benchmarks/results/resize

A run on the digits begins with 2 ranks, is stopped by SIGTERM after a quarter of its rounds, goes on with 1, then 3,
then 2 to its end: once as DDP over gloo, once as DeepSpeed ZeRO-2. Beside it the same run on 2 ranks that is never
stopped, for several seeds: their spread is what a seed makes. Prints and writes a table of the losses, means of the
last tenth of the rounds (resize.md), and the curves laid over each other (resize.png).
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
WORLDS = (2, 1, 3, 2)
NAMES = ("loss/total", "loss/reconstruction", "loss/imle", "match/distance")


@dataclass(kw_only=True, slots=True)
class Settings:
    """Compare resized runs with one that is not."""

    to: Path | None = None
    """Where to write, without an ending; default: print only."""
    images: int = 46_080
    """Budget of a run; whole rounds of 768."""
    seeds: int = 3
    """Of the run that is never stopped."""


def command(engine: str, world: int, folder: Path, data: Path, settings: Settings, seed: int) -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--quiet"),
        *("--config_file", str(ROOT / f"launch/{engine}.yaml"), "--num_processes", str(world)),
        *("--main_process_port", "0", str(ROOT / "pipeline/train.py"), f"--data.path={data}", f"--run.path={folder}"),
        *("--match.round=768", "--train.batch=48", "--match.ratio=4", "--model.width=16", "--model.code=32"),
        *("--train.threads=1", "--report.pictures=0", f"--train.images={settings.images}", f"--seed={seed}"),
    ]


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(engine: str, world: int, folder: Path, data: Path, settings: Settings, *, seed: int, until: int) -> None:
    """Train until so many rounds are reported, then SIGTERM to the ranks, which stop on their own."""
    rounds = settings.images // 768
    with subprocess.Popen(command(engine, world, folder, data, settings, seed), stderr=subprocess.PIPE) as job:
        while job.poll() is None and len(lines(folder)) < until:
            time.sleep(0.02)
        if until < rounds:
            ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=False).stdout
            for pid in ranks.split() or [str(job.pid)]:
                subprocess.run(["kill", f"-{signal.SIGTERM.value}", pid], check=False)
        _, errors = job.communicate(timeout=300)
    if until >= rounds and job.returncode:
        raise RuntimeError(errors.decode()[-3000:])


def curves(found: dict[str, list[dict[str, float]]]) -> Image.Image:
    """The total loss over rounds, a line a run."""
    colours = ("#b0b0b0", "#b0b0b0", "#b0b0b0", "#d62728", "#1f77b4")
    width, height, edge = 900, 420, 50
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    values = [line["loss/total"] for run in found.values() for line in run[2:]]
    low, high, rounds = min(values), max(values), max(len(run) for run in found.values())
    for number, (name, run) in enumerate(found.items()):
        points = [
            (
                edge + (width - 2 * edge) * line["round"] / rounds,
                height - edge - (height - 2 * edge) * (line["loss/total"] - low) / (high - low),
            )
            for line in run[2:]
        ]
        draw.line(points, fill=colours[number], width=2 if number > 2 else 3)
        draw.text((width - 330, 20 + 16 * number), name, fill=colours[number])
    for quarter in range(1, 4):
        x = edge + (width - 2 * edge) * quarter / 4
        draw.line([(x, edge), (x, height - edge)], fill="#dddddd")
        draw.text((x + 3, height - edge), f"{WORLDS[quarter - 1]} -> {WORLDS[quarter]} ranks", fill="#777777")
    draw.text((edge, 20), f"loss/total, {high:.3f} to {low:.3f}, over {rounds} rounds", fill="black")
    return picture


def main(settings: Settings) -> None:
    rounds = settings.images // 768
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "digits"
        subprocess.run([sys.executable, "-m", "naign.cli", "pack", "digits", "--to", str(data)], check=True)
        for seed in range(settings.seeds):
            folder = Path(place) / f"seed{seed}"
            run("cpu", 2, folder, data, settings, seed=seed, until=rounds)
            found[f"2 ranks, DDP, seed {seed}"] = lines(folder)
        for engine, title in (("cpu", "DDP"), ("zero2", "ZeRO-2")):
            folder = Path(place) / engine
            for part, world in enumerate(WORLDS, 1):
                run(engine, world, folder, data, settings, seed=0, until=rounds * part // len(WORLDS))
            found[f"2, 1, 3, 2 ranks, {title}, seed 0"] = lines(folder)
    if any([line["round"] for line in run_] != list(range(rounds)) for run_ in found.values()):
        raise RuntimeError("a round is missing or twice there")
    rows = ["| run | " + " | ".join(NAMES) + " |", "| --- " * (len(NAMES) + 1) + "|"]
    for name, run_ in found.items():
        tail = run_[-rounds // 10 :]
        rows.append(f"| {name} | " + " | ".join(f"{sum(x[key] for x in tail) / len(tail):.4f}" for key in NAMES) + " |")
    page = f"`python benchmarks/resize.py`: means of the last {rounds // 10} of {rounds} rounds.\n\n" + "\n".join(rows)
    print(page)
    if settings.to:
        settings.to.with_suffix(".md").write_text(page + "\n")
        curves(found).save(settings.to.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Settings))
