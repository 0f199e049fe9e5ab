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

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml
from tqdm import tqdm
from trained import COLUMNS, Record, Task, fingerprint, measure_all, spread, stored, table, write

from naign.errors import InputError, exit_on_input_error

COLUMNS_SHOWN = [
    name for name in COLUMNS if name not in ("fd_once", "fd_twice", "commonest", "copying", "images", "late")
]
KEPT = (
    *("fd", "modes", "coverage", "restoration", "density", "idempotence", "reconstruction", "nearest"),
    *("training_seconds", "cpu_seconds"),
)


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
    train: bool = True
    """Train what is missing; otherwise take in what is there."""
    runs: Path = Path("runs/tables")
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
            lists = {"common": said.get("common") or [], "images": said["images"], **said["trials"]}
            if wrong := [str(name) for name, value in lists.items() if not isinstance(value, list)]:
                raise TypeError(f"{', '.join(wrong)}: a list is needed")
            trials = {str(name): [str(option) for option in options] for name, options in said["trials"].items()}
            common = [str(option) for option in lists["common"]]
            found = cls(str(said["base"]), [int(n) for n in said["images"]], float(said["keep"]), trials, common)
            if not (found.images and found.trials and 0 < found.keep <= 1):
                raise ValueError("it needs images, trials, and keep above 0 and at most 1")
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file} is no search ({type(error).__name__}: {error}): see benchmarks/search.yaml"
            ) from None
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
    return float("inf") if "failed" in record else float(record["metrics"]["fd"]["once"])


def page(search: Search, file: Path, to: Path, found: Record) -> str:
    """One table a rung, best first."""
    base = " ".join([search.base, *search.common])
    columns = [COLUMNS[name] for name in COLUMNS_SHOWN]
    command = f"`python benchmarks/search.py {file} --rung N --to {to}`"
    parts = [f"{command}, one seed each, on `{base}`; restoration is mean absolute error."]
    for rung, images in enumerate(search.images):
        there = [name for name in search.trials if key(name, rung) in found]
        rows = list[list[str]]()
        for name in sorted(there, key=lambda name: score(found[key(name, rung)])):
            record = found[key(name, rung)]
            cells = [
                spread([column.get(record["metrics"])], column.digits) for column in columns if "metrics" in record
            ]
            rows.append(
                [name, " ".join(record["options"]) or "-", *(cells or ["diverged", *["-"] * (len(columns) - 1)])]
            )
        if rows:
            titles = ["trial", "options", *(column.title for column in columns)]
            parts += [f"Rung {rung}, {images:,} images", table(titles, rows)]
    return "\n\n".join(parts) + "\n"


def main(settings: Settings) -> None:
    search = Search.read(settings.file)
    if settings.jobs < 1:
        raise InputError(f"--jobs {settings.jobs} must be at least 1")
    found = stored(settings.to, dict)
    tasks = dict[str, Task]()
    for name in search.of_rung(settings.rung, found):
        options = [*search.common, *search.trials[name], f"--train.images={search.images[settings.rung]}"]
        task = Task.of(settings.runs, search.base, options, 0)
        there = found.get(key(name, settings.rung))
        if there and there["settings"] != fingerprint(task.settings):
            raise InputError(
                f"{settings.to}.json has '{key(name, settings.rung)}' with other settings than {settings.file} gives it"
                " now: rename the trial, or remove what is there"
            )
        if not there and (settings.train or task.measured):
            tasks[name] = task
    for name, record in measure_all(tasks, settings.jobs):
        measured = record if "failed" in record else {"metrics": {part: record.get(part) for part in KEPT}}
        said = {"options": search.trials[name], "settings": fingerprint(tasks[name].settings)}
        found[key(name, settings.rung)] = said | measured
        tqdm.write(f"{name}: {score(found[key(name, settings.rung)]):.1f}", file=sys.stderr)
        write(settings.to, page(search, settings.file, settings.to, found), found)
    text = page(search, settings.file, settings.to, found)
    write(settings.to, text, found)
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("search"):
        main(tyro.cli(Settings))
