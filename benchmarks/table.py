"""A table of networks side by side, mean ± standard deviation over seeds.

    python benchmarks/table.py benchmarks/rivals.yaml --to benchmarks/results/rivals

The file names the rows, each a configuration with options (or numbers that were printed elsewhere), the seeds and the
columns. A run is one process of one thread, trained and measured by `naign evaluate`, and kept under runs/tables, where
other tables find it. The table (.md) and its numbers (.json) are written after each run. Numbers that the .json has are
not measured again: to measure a row anew, remove it there or write to another place.

`then: [naign.cli, export, --steps=16]` measures another model instead, made from the run by
`python -m naign.cli export --steps=16 RUN --to=FOLDER`. Such rows share one training.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
import yaml
from columns import COLUMNS, kept
from output import Record, page, say, seeds_of, spread, stored, write
from trained import Task, measure_all, packed

from naign.errors import InputError, exit_on_input_error

ANSWERS = ("input", "nearest")
"""Repairs without a network."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make a table."""

    file: tyro.conf.Positional[Path]
    """Title, seeds, columns and rows."""
    to: Path
    """Where to write, without an ending."""
    seeds: int = 0
    """Only the first few of the file's seeds; 0: all."""
    jobs: int = 2
    """Runs at a time."""
    train: bool = True
    """Train and measure what is missing; otherwise show what exists."""
    runs: Path = Path("runs/tables")
    """Folder of the runs."""


@dataclass(slots=True)
class Row:
    """A row of the table."""

    config: str = ""
    options: list[str] = field(default_factory=list)
    then: list[str] = field(default_factory=list)
    printed: dict[str, Any] = field(default_factory=dict)
    """Numbers by column that were published elsewhere, in place of a config."""

    def __post_init__(self) -> None:
        check_type("config", self.config, str)
        for name in ("options", "then"):
            check_type(name, getattr(self, name), list)
        check_type("printed", self.printed, dict)
        if bool(self.config) == bool(self.printed):
            raise TypeError("a row has a config, and may have options and then, or has printed alone")
        check_names("printed", self.printed, COLUMNS)
        self.options = [str(option) for option in self.options]
        self.then = [str(word) for word in self.then]


@dataclass(kw_only=True, slots=True)
class Plan:
    """The file's content."""

    title: str
    seeds: list[int]
    columns: list[str]
    rows: dict[str, Row]
    common: list[str] = field(default_factory=list)
    """Options of every row, before its own."""
    answers: list[str] = field(default_factory=list)
    packed: dict[str, list[str]] = field(default_factory=dict)
    """Data sets by path that are packed if missing, with the arguments of `naign pack`."""

    def __post_init__(self) -> None:
        for name in ("seeds", "columns", "common", "answers"):
            check_type(name, getattr(self, name), list)
        check_type("packed", self.packed, dict)
        for path, arguments in self.packed.items():
            check_type(f"packed {path}", arguments, list)
            self.packed[path] = [str(argument) for argument in arguments]
        whole = all(type(seed) is int for seed in self.seeds)
        if not whole or len(set(self.seeds)) < len(self.seeds):
            raise TypeError("seeds must be whole numbers that differ")
        if not self.seeds or not self.rows:
            raise TypeError("it needs seeds and rows")
        check_names("columns", self.columns, COLUMNS)
        check_names("answers", self.answers, ANSWERS)

    @classmethod
    def read(cls, file: Path) -> "Plan":
        """Raises InputError for a file that is not a table, before hours of training."""
        try:
            said = yaml.safe_load(file.read_text())
            rows = {}
            for name, row in said["rows"].items():
                rows[str(name)] = Row(**row)
            return cls(**said | {"rows": rows})
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{file} is not a table: {error}: see benchmarks/rivals.yaml") from None


def check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}")


def check_names(what: str, asked: Any, known: Any) -> None:
    unknown = [str(name) for name in asked if name not in list(known)]
    if unknown:
        raise TypeError(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}")


def main(settings: Settings) -> None:
    plan = Plan.read(settings.file)
    if not 0 <= settings.seeds <= len(plan.seeds) or settings.jobs < 1:
        raise InputError(f"--seeds must be 0 to {len(plan.seeds)}, which {settings.file} has, and --jobs at least 1")
    seeds = plan.seeds[: settings.seeds or None]
    found: dict[str, list[Record]] = stored(settings.to, list)
    absent = pack_missing(plan) if settings.train else set()

    missing: dict[str, Task] = {}
    owners: dict[str, list[str]] = {}
    for seed in seeds:  # all rows of one seed first
        for name, row in plan.rows.items():
            if row.printed:
                continue
            task = task_of(settings, plan, name, seed)
            run = task.folder.name
            known = [record for record in found.get(name, []) if seed_of(record) == seed]
            if known:
                if known[0]["run"] != run:
                    say(f"table: '{name}', seed {seed}: its numbers are of other settings; remove them to measure anew")
            elif task.measured or (settings.train and not absent & set(task.options)):
                missing[run] = task
                owners.setdefault(run, []).append(name)
    if missing:
        say(f"table: the log of each run is {settings.runs}/RUN/log")
    for run, record in measure_all(missing, settings.jobs):
        for name in owners[run]:
            records = found.setdefault(name, [])
            records.append({"run": run, **kept(record)})
            records.sort(key=seed_of)
        write(settings.to, table_of(plan, found, seeds), found)
    if not any(found.get(name) for name in plan.rows):
        raise InputError(
            f"nothing of {settings.file} is in {settings.runs}: leave out --no-train, or give rows a config"
        )
    text = table_of(plan, found, seeds)
    write(settings.to, text, found)
    print(text)


def task_of(
    settings: Settings,
    plan: Plan,
    name: str,
    seed: int,
) -> Task:
    row = plan.rows[name]
    try:
        options = [*plan.common, *row.options]
        return Task.of(settings.runs, row.config, options, seed, row.then)
    except InputError as error:
        raise InputError(f"{settings.file}: row '{name}': {error}") from None


def pack_missing(plan: Plan) -> set[str]:
    """Pack the plan's data sets; returns the options that name a data set that cannot be packed."""
    absent = set()
    for path, arguments in plan.packed.items():
        try:
            packed(path, *arguments)
        except InputError as error:
            print(f"table: {error}; rows of it that are not there yet are left out", file=sys.stderr)
            absent.add(f"--data.path={path}")
    return absent


def seed_of(record: Record) -> int:
    """The seed of a record, by the name of its run."""
    try:
        _, _, rest = record["run"].partition("-seed-")
        return int(rest.partition("-")[0])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"a record of the table names no run: {str(record)[:60]}: write --to another place") from None


def table_of(
    plan: Plan,
    found: dict[str, list[Record]],
    seeds: list[int],
) -> str:
    """The table of what has been measured."""
    columns = [COLUMNS[name] for name in plan.columns]
    lines = []
    repairs: Record = {}
    for name, row in plan.rows.items():
        if row.printed:
            cells = [str(row.printed.get(column, "-")) for column in plan.columns]
            lines.append([name, *cells])
            continue
        records = [record for record in found.get(name, []) if seed_of(record) in seeds]
        good = [record for record in records if "failed" not in record]
        if not records:
            continue
        if good:
            repairs = repairs or good[0].get("restoration") or {}
        cells = [spread(map(column.get, good), column.digits) for column in columns]
        lost = len(records) - len(good)
        lines.append([name + seeds_of(len(good), lost), *cells])
    if repairs:
        lines += answers_of(plan, repairs)
    titles = [column.title for column in columns]
    return page(plan.title, ["", *titles], lines)


def answers_of(plan: Plan, repairs: Record) -> list[list[str]]:
    """Rows of repairs without a network, which are the same for every network."""
    lines = []
    for answer in plan.answers:
        cells = []
        for column in plan.columns:
            errors = repairs.get(column)
            cells.append(f"{errors[answer]:.3f}" if errors else "-")
        lines.append([f"answering with {answer}", *cells])
    return lines


if __name__ == "__main__":
    with exit_on_input_error("table"):
        main(tyro.cli(Settings))
