"""Search for a recipe by successive halving: many for a short time, the best of them for longer.

    python benchmarks/search.py benchmarks/search.yaml --rung 0 --to benchmarks/results/search
    python benchmarks/search.py benchmarks/search.yaml --rung 1 --to benchmarks/results/search

The file names a configuration, options common to all, a budget in images for each rung, and trials, each with the
options in which it differs. Rung 0 tries all; a later one the share that was best on the rung before, by the Frechet
distance of f(z). A trial is trained anew on each rung, on one seed and one thread. Its numbers are written at once and
not measured again, so a search that was cut off continues. The table is search.md.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro
import yaml
from columns import COLUMNS, kept
from output import Record, say, spread, stored, table, write
from trained import Task, measure_all

from naign.errors import InputError, exit_on_input_error

SHOWN = [
    "once",
    "twice",
    "latents",
    "rarest",
    "precision",
    "recall",
    "blur",
    "noise",
    "salt_pepper",
    "rows",
    "reconstruction",
    "idempotence",
    "upside_down",
    "minutes",
]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Try recipes."""

    file: tyro.conf.Positional[Path]
    """Base, images by rung, keep, trials and common."""
    to: Path
    """Where to write, without an ending."""
    rung: int = 0
    """The budget to use."""
    jobs: int = 2
    """Trials at a time."""
    train: bool = True
    """Train what is missing; otherwise take in what exists."""
    runs: Path = Path("runs/tables")
    """Folder of the runs; they may be removed afterwards."""


@dataclass(kw_only=True, slots=True)
class Search:
    """The file's content."""

    base: str
    images: list[int]
    keep: float
    trials: dict[str, list[str]]
    common: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lists = {"images": self.images, "common": self.common, **self.trials}
        for name, value in lists.items():
            if not isinstance(value, list):
                raise TypeError(f"{name}: a list is needed")
        if not self.images or not self.trials or not 0 < self.keep <= 1:
            raise ValueError("it needs images, trials, and keep above 0 and at most 1")

    @classmethod
    def read(cls, file: Path) -> "Search":
        try:
            return cls(**yaml.safe_load(file.read_text()))
        except (OSError, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file} is not a search: {error}: see benchmarks/search.yaml") from None

    def of_rung(self, rung: int, found: Record) -> list[str]:
        """The trials of a rung, best first. Raises InputError if the rung before is not done."""
        if not 0 <= rung < len(self.images):
            raise InputError(f"--rung {rung}: there are budgets for 0 to {len(self.images) - 1}")
        if rung == 0:
            return list(self.trials)
        before = self.of_rung(rung - 1, found)
        missing = [name for name in before if key(name, rung - 1) not in found]
        if missing:
            raise InputError(f"rung {rung - 1} is not done: {', '.join(missing)} missing; run it first")
        before.sort(key=lambda name: score(found[key(name, rung - 1)]))
        kept_trials = max(1, round(self.keep * len(before)))
        return before[:kept_trials]


def key(name: str, rung: int) -> str:
    return f"{name}, rung {rung}"


def score(record: Record) -> float:
    if "failed" in record:
        return float("inf")
    return float(record["metrics"]["fd"]["once"])


def page(
    search: Search,
    settings: Settings,
    found: Record,
) -> str:
    """One table a rung, best first."""
    columns = [COLUMNS[name] for name in SHOWN]
    base = " ".join([search.base, *search.common])
    command = f"`python benchmarks/search.py {settings.file} --rung N --to {settings.to}`"
    parts = [f"{command}, one seed each, on `{base}`; restoration is mean absolute error."]
    for rung, images in enumerate(search.images):
        tried = []
        for name in search.trials:
            record = found.get(key(name, rung))
            if record:
                tried.append((score(record), name, record))
        rows = []
        for _, name, record in sorted(tried, key=lambda trial: trial[0]):
            cells = ["diverged", *["-"] * (len(columns) - 1)]
            if "metrics" in record:
                metrics = record["metrics"]
                cells = [spread([column.get(metrics)], column.digits) for column in columns]
            options = " ".join(record["options"]) or "-"
            rows.append([name, options, *cells])
        if rows:
            titles = ["trial", "options", *(column.title for column in columns)]
            parts += [f"Rung {rung}, {images:,} images", table(titles, rows)]
    return "\n\n".join(parts) + "\n"


def main(settings: Settings) -> None:
    search = Search.read(settings.file)
    if settings.jobs < 1:
        raise InputError(f"--jobs {settings.jobs} must be at least 1")
    found = stored(settings.to, dict)
    tasks = {}
    for name in search.of_rung(settings.rung, found):
        if key(name, settings.rung) in found:
            known = found[key(name, settings.rung)]
            if known["options"] != search.trials[name]:
                raise InputError(f"{settings.to}.json has '{name}' with other options: rename the trial, or remove it")
            continue
        options = [*search.common, *search.trials[name], f"--train.images={search.images[settings.rung]}"]
        task = Task.of(settings.runs, search.base, options, 0)
        if settings.train or task.measured:
            tasks[name] = task
    for name, record in measure_all(tasks, settings.jobs):
        said = {"options": search.trials[name]}
        said |= record if "failed" in record else {"metrics": kept(record)}
        found[key(name, settings.rung)] = said
        say(f"{name}: {score(said):.1f}")
        write(settings.to, page(search, settings, found), found)
    text = page(search, settings, found)
    write(settings.to, text, found)
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("search"):
        main(tyro.cli(Settings))
