"""Search for a recipe by successive halving: many for a short time, the best of them for longer.

    python benchmarks/search.py benchmarks/search.yaml --rung 0 --to benchmarks/results/search
    python benchmarks/search.py benchmarks/search.yaml --rung 1 --to benchmarks/results/search

The file names a configuration, options common to all, a budget in images for each rung, and trials, each with the
options in which it differs.
Rung 0 tries all; a later one the share that was best on the rung before. A trial is trained anew on each rung, since
the learning rate falls over the whole budget, on one seed, and measured by `naign evaluate`; what it found stands in
search.json at once, and is not done again, so that a search may be cut off and goes on. search.md is the table.

The order is that of the Frechet distance of f(z). One process of one thread a trial, `--jobs` trials at a time: their
quality does not depend on the machine, their seconds do.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml
from compare import KINDS, table
from tqdm import tqdm

from pipeline.config import load
from pipeline.errors import InputError, exit_on_input_error

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Try recipes."""

    file: tyro.conf.Positional[Path]
    """Trials: base, images (by rung), keep, trials; common is optional."""
    to: Path
    """Where to write, without an ending."""
    rung: int = 0
    """Which budget."""
    jobs: int = 2
    """Trials at a time."""
    runs: Path = Path("runs/search")
    """Where the trials' runs lie; they may be removed afterwards."""


@dataclass(frozen=True, slots=True)
class Search:
    """What the file says."""

    base: str
    images: list[int]
    keep: float
    trials: dict[str, list[str]]
    common: list[str]

    @classmethod
    def read(cls, file: Path) -> "Search":
        try:
            said = yaml.safe_load(file.read_text())
            trials = {str(name): [str(option) for option in options] for name, options in said["trials"].items()}
            common = [str(option) for option in said.get("common") or []]
            found = cls(str(said["base"]), [int(n) for n in said["images"]], float(said["keep"]), trials, common)
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file} is no search ({type(error).__name__}: {error}): see benchmarks/search.yaml"
            ) from None
        load(str(ROOT / found.base))
        return found

    def of_rung(self, rung: int, found: Record) -> list[str]:
        """The trials of a rung, best first; InputError where the rung before is not done."""
        if not 0 <= rung < len(self.images):
            raise InputError(f"--rung {rung}: there are budgets for 0 to {len(self.images) - 1}")
        if rung == 0:
            return list(self.trials)
        before = self.of_rung(rung - 1, found)
        missing = [name for name in before if key(name, rung - 1) not in found]
        if missing:
            raise InputError(f"rung {rung - 1} is not done: {', '.join(missing)} missing; run it first")
        ranked = sorted(before, key=lambda name: score(found[key(name, rung - 1)]))
        return ranked[: max(1, round(self.keep * len(ranked)))]


def key(name: str, rung: int) -> str:
    return f"{name}, rung {rung}"


def score(record: Record) -> float:
    distance = record["metrics"]["fd"]["once"]
    return float("inf") if distance is None else float(distance)


def attempt(search: Search, name: str, rung: int, folder: Path) -> Record:
    """Train and measure one trial; what is kept of it."""
    options = [*search.common, *search.trials[name], f"--train.images={search.images[rung]}", f"--run.path={folder}"]
    train = [sys.executable, str(ROOT / "pipeline/train.py"), "--config", str(ROOT / search.base), *options]
    measure = [sys.executable, "-m", "pipeline.cli", "evaluate", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        for command in ([*train, "--train.threads=1", "--report.pictures=0"], measure):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    metrics = json.loads((folder / "evaluation/metrics.json").read_text())
    kept = ("fd", "modes", "coverage", "restoration", "idempotence", "reconstruction", "training_seconds")
    return {"options": search.trials[name], "metrics": {part: metrics[part] for part in kept}}


def page(search: Search, file: Path, found: Record) -> str:
    """One table a rung, best first."""
    head = ["trial", "options", "FD f(z), x floor", "f(f(z))", "rarest digit", "P / R / D / C", *KINDS, "idempotence"]
    base = " ".join([search.base, *search.common])
    parts = [f"`python benchmarks/search.py {file}`, on `{base}`; restoration is the mean absolute error once."]
    for rung, images in enumerate(search.images):
        there = [name for name in search.trials if key(name, rung) in found]
        rows = list[list[str]]()
        for name in sorted(there, key=lambda name: score(found[key(name, rung)])):
            metrics = found[key(name, rung)]["metrics"]
            fd, floor = metrics["fd"], metrics["fd"]["floor"]
            rows.append([name, " ".join(found[key(name, rung)]["options"]) or "-", f"{fd['once'] / floor:.1f}"])
            rarest = f"{100 * min(metrics['modes']):.1f} %" if metrics["modes"] else "-"
            rows[-1] += [f"{fd['twice'] / floor:.1f}", rarest]
            overlap = (metrics["coverage"][part] for part in ("precision", "recall", "density", "coverage"))
            rows[-1] += [" / ".join(f"{share:.2f}" for share in overlap)]
            rows[-1] += [f"{metrics['restoration'][kind]['once']:.3f}" for kind in KINDS]
            rows[-1] += [f"{metrics['idempotence']['samples']:.3f}"]
        if rows:
            parts += [f"Rung {rung}, {images:,} images", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def main(settings: Settings) -> None:
    search = Search.read(settings.file)
    to = settings.to.with_suffix(".json")
    found: Record = json.loads(to.read_text()) if to.exists() else {}
    names = [name for name in search.of_rung(settings.rung, found) if key(name, settings.rung) not in found]

    with ThreadPoolExecutor(settings.jobs) as pool, tqdm(total=len(names), unit="trial") as bar:
        tasks = {}
        for name in names:
            folder = settings.runs.absolute() / f"{settings.rung}-{re.sub(r'[^a-zA-Z0-9.]+', '-', name)}"
            tasks[pool.submit(attempt, search, name, settings.rung, folder)] = name
        for task in as_completed(tasks):
            found[key(tasks[task], settings.rung)] = task.result()
            to.write_text(json.dumps(found, indent=1) + "\n")
            to.with_suffix(".md").write_text(page(search, settings.file, found))
            tqdm.write(f"{tasks[task]}: {score(task.result()):.1f}", file=sys.stderr)
            bar.update()
    print(page(search, settings.file, found))


if __name__ == "__main__":
    with exit_on_input_error("search"):
        main(tyro.cli(Settings))
