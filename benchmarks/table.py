"""A table of networks side by side, mean ± standard deviation over seeds.

    python benchmarks/table.py benchmarks/generation.yaml --to benchmarks/results/generation

The file names its rows, each a configuration with options (a published one gives its numbers instead), the seeds and
the columns. Every run is one process of one thread, trained and measured as `naign evaluate` does, and kept under
runs/tables: what is there is not done again, so a table may be cut off and goes on, and tables share their runs. So it
is with what a table in the folder of `--to` rests on already: to make all anew, write to another folder. A row says how
many seeds it rests on, and is left out while there is none. It writes the table (.md) and what it rests on (.json).

A row may measure another model that is made of its run: `then: [naign.cli, export, --prior=gmm]` runs
`python -m naign.cli export --prior=gmm RUN --to=FOLDER`. Rows of one configuration share its training.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro
import yaml
from trained import COLUMNS, Record, Task, beside, by_run, measure_all, packed, page, seeds_of, spread, stored, write

from naign.errors import InputError, exit_on_input_error

ANSWERS = ("input", "black", "median", "nearest")
"""To damage, without a network."""
NOT_SHOWN = "not in the table"
"""What is kept of it all the same: of seeds that were not asked for, or rows that the file has no more."""
KEPT = (
    *("fd", "modes", "coverage", "restoration", "density", "idempotence", "reconstruction", "nearest", "encoder"),
    *("images_seen", "training_seconds", "cpu_seconds", "counts", "late"),
)
ALSO_KEPT = ("sampling", "second", "asked")
"""Where it is there: records of earlier tables lack it."""


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
    """Train and measure what is missing; otherwise the table is of what is there."""
    runs: Path = Path("runs/tables")
    """Where the runs lie."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the file says."""

    title: str
    seeds: list[int]
    columns: list[str]
    rows: dict[str, dict[str, Any]]
    common: list[str]
    """Options of every row; its own come after them."""
    answers: list[str]
    packed: dict[str, list[str]]
    """Data sets that are packed where they are missing, by path, with the arguments of `naign pack`."""

    @classmethod
    def read(cls, file: Path) -> "Plan":
        try:
            said = yaml.safe_load(file.read_text())
            if unknown := set(said) - {field.name for field in fields(cls)}:
                raise TypeError(f"it says {', '.join(sorted(map(str, unknown)))}")
            rows = {str(name): dict(row) for name, row in said["rows"].items()}
            seeds = list(said["seeds"])
            if not all(type(seed) is int for seed in seeds):
                raise TypeError("seeds must be whole numbers")
            data = {str(path): [str(word) for word in words] for path, words in said.get("packed", {}).items()}
            common = said.get("common", [])
            if not isinstance(common, list):
                raise TypeError("common must be a list of options")
            plan = cls(
                str(said["title"]),
                seeds,
                [str(name) for name in said["columns"]],
                rows,
                [str(option) for option in common],
                [str(name) for name in said.get("answers", [])],
                data,
            )
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file} is no table ({type(error).__name__}: {error}): see benchmarks/generation.yaml"
            ) from None
        plan.check(file)
        return plan

    def check(self, file: Path) -> None:
        """InputError for what a run of hours would stumble over."""
        names = {"columns": (self.columns, tuple(COLUMNS)), "answers": (self.answers, ANSWERS)}
        for what, (asked, there) in names.items():
            if unknown := set(asked) - set(there):
                raise InputError(f"{file}: no {what} {', '.join(sorted(unknown))}; there are {', '.join(there)}")
        if not self.rows or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"{file}: it needs rows, and seeds that differ: see benchmarks/generation.yaml")
        for name, row in self.rows.items():
            if set(row) != {"printed"} and ("config" not in row or set(row) - {"config", "options", "then"}):
                said = "must have config, and may have options and then, or have printed alone"
                raise InputError(f"{file}: row '{name}' {said}")
            then = row.get("then", [])
            if not isinstance(then, list) or not all(isinstance(word, str) for word in then):
                raise InputError(f"{file}: row '{name}': then must be a list of words: [naign.cli, export, ...]")
            if not isinstance(row.get("printed", {}), dict):
                raise InputError(f"{file}: row '{name}': printed must name columns: {{blur: 0.15}}")
            if not isinstance(row.get("options", []), list) or not isinstance(row.get("config", ""), str):
                raise InputError(
                    f"{file}: row '{name}' takes a file's name, and its options must be a list: [--train.lr=1e-3]"
                )
            if unknown := set(row.get("printed", {})) - set(COLUMNS):
                raise InputError(f"{file}: row '{name}' has no columns {', '.join(sorted(unknown))}")


def table_of(plan: Plan, found: dict[str, list[Record]]) -> str:
    """The table, of what has been measured."""
    columns, rows = [COLUMNS[name] for name in plan.columns], list[list[str]]()
    for name, row in plan.rows.items():
        if printed := row.get("printed"):
            rows.append([name, *(str(printed.get(column, "-")) for column in plan.columns)])
        elif records := found.get(name):
            good = [record for record in records if "failed" not in record]
            seeds = seeds_of(len(good), len(records) - len(good))
            rows.append(
                [name + seeds, *(spread([column.get(one) for one in good], column.digits) for column in columns)]
            )
    for answer in plan.answers:  # that need no network: the same in every run but for the seed of the damage
        kinds = next((one["restoration"] for records in found.values() for one in records if "failed" not in one), None)
        if kinds:
            cells = [f"{kinds[column][answer]:.3f}" if column in kinds else "-" for column in plan.columns]
            rows.append([f"answering with {answer}", *cells])
    return page(plan.title, ["", *(column.title for column in columns)], rows)


def main(settings: Settings) -> None:
    plan = Plan.read(settings.file)
    if not 0 <= settings.seeds <= len(plan.seeds) or settings.jobs < 1:
        raise InputError(f"--seeds must be 0 to {len(plan.seeds)}, which {settings.file} has, and --jobs at least 1")
    before = stored(settings.to, list)
    absent = set[str]()
    for path, arguments in plan.packed.items() if settings.train else ():
        try:
            packed(path, *arguments)
        except InputError as error:  # as CIFAR-10, where its archive is not
            print(f"table: {error}; rows of it that are not there yet are left out", file=sys.stderr)
            absent.add(f"--data.path={path}")
    seeds = plan.seeds[: settings.seeds or None]
    tasks, names = dict[str, Task](), dict[str, list[str]]()
    records = beside(settings.to, KEPT) | by_run(before, KEPT)  # its own number before another's
    for seed in seeds:  # all rows on one seed first
        for name, row in plan.rows.items():
            if "config" in row:
                try:
                    options, then = [*plan.common, *row.get("options", [])], row.get("then", [])
                    task = Task.of(settings.runs, row["config"], options, seed, then)
                except InputError as error:
                    raise InputError(f"{settings.file}: row '{name}': {error}") from None
                names.setdefault(name, []).append(run := task.folder.name)
                if task.measured or (settings.train and run not in records and not absent & {*task.options}):
                    tasks[run] = task

    def report() -> str:
        found = {name: [records[run] for run in names.get(name, ()) if run in records] for name in plan.rows}
        if not any(found.values()):
            raise InputError(
                f"nothing of {settings.file} is in {settings.runs}: leave out --no-train, and give rows a config"
            )
        text = table_of(plan, found)
        shown = {record["run"] for row in found.values() for record in row}
        rest = [record for row in before.values() for record in row if record.get("run") not in shown]
        write(settings.to, text, found | ({NOT_SHOWN: rest} if rest else {}))
        return text

    if tasks:
        print(f"table: the log of each run is {settings.runs}/RUN/log", file=sys.stderr)
    for run, record in measure_all(tasks, settings.jobs):
        kept = {part: record.get(part) for part in KEPT} | {part: record[part] for part in ALSO_KEPT if part in record}
        records[run] = {"run": run} | (record if "failed" in record else kept)
        report()
    print(report())


if __name__ == "__main__":
    with exit_on_input_error("table"):
        main(tyro.cli(Settings))
