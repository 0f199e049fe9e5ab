"""What tables compare: networks that are trained and measured once, whichever table asks first."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, mean, stdev
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from naign.config import changeable, flatten, parse
from naign.errors import InputError
from naign.settings.constraints import FREE
from naign.storage.local import write_atomically

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]
PARTS = ("fd", "modes", "coverage", "restoration", "idempotence", "reconstruction", "nearest", "images_seen")
"""Of what `naign evaluate` says, that tables use."""
ADDED = {"prior.classes": False, "prior.guidance": 0.0, "model.grid": 8, "model.blend": False}
ADDED |= {"train.optimizer": "adamw", "train.schedule": "cosine"}
GONE = {"match.space.pixels": 1.0, "match.space.features": 0.0, "match.space.encoder": ""}
"""Settings newer than committed numbers, with the values that change nothing: folders are not named after these; and
settings that are no more, with the values that these numbers have: folders are."""
FOUND, FAILED, TRAINED = "evaluation/metrics.json", "failed.json", "trained"
"""Where a run's folder has what `naign evaluate` found, that it diverged, or that it is trained."""


@dataclass(frozen=True, slots=True)
class Task:
    """A network to train and measure, or another model that is made of it then."""

    folder: Path
    """Of what is measured; it may be removed once its numbers are kept elsewhere."""
    trained: Path
    """Of the run; the same unless another model is made of it."""
    config: str
    """Below the repository."""
    options: tuple[str, ...]
    settings: Record
    """All that decides what is computed, by name."""
    then: tuple[str, ...] = ()
    """What `python -m` runs to make the model that is measured, of the run's folder and of --to, which follow."""

    @classmethod
    def of(cls, runs: Path, config: str, options: Iterable[object], seed: int, then: Iterable[str] = ()) -> "Task":
        """In a folder of `runs` named after all that decides what is computed, so that tables that ask for the same
        share it, and none finds what an older configuration made. InputError where it is no configuration.
        """
        words = (*(str(option) for option in options), f"--seed={seed}")
        try:
            parsed = parse([f"--config={ROOT / config}", *words])
        except SystemExit:  # what is wrong, or the help that was asked for, stands above
            raise InputError(f"{shlex.join([config, *words])} is no configuration") from None
        free = changeable(parsed, FREE) - {"train.precision"}  # a run may change it, and rounds otherwise then
        settings = {key: value for key, value in flatten(parsed).items() if key not in free}
        named = GONE | {key: value for key, value in settings.items() if (key, value) not in ADDED.items()}
        name = f"{Path(config).stem}-seed-{seed}-{fingerprint(named)}"
        steps = tuple(then)
        folder = runs / (f"{name}-{fingerprint({'then': steps})}" if steps else name)
        return cls(folder, runs / name, config, words, settings, steps)

    @property
    def measured(self) -> bool:
        """Whether its numbers are there, or that it diverged."""
        return (self.folder / FOUND).exists() or (self.trained / FAILED).exists()

    @property
    def ended(self) -> bool:
        """Whether it is trained, or diverged."""
        return (self.trained / TRAINED).exists() or (self.trained / FAILED).exists()

    def train(self) -> None:
        """Train it, if it is not yet, as `measure` does."""
        with self._locked():
            self._train()

    def measure(self) -> Record:
        """What `naign evaluate` says of it, trained first if it is not yet; {"failed": reason} if it diverged.

        One process of one thread: quality does not depend on the machine, seconds do. Cut off, it goes on from its
        newest checkpoint. Raises InputError if a command fails, or its folder cannot be used.
        """
        folder, trained = self.folder.absolute(), self.trained.absolute()
        evaluate = [sys.executable, "-m", "naign.cli", "evaluate", str(folder)]
        make = [sys.executable, "-m", *self.then, str(trained), f"--to={folder}"] if self.then else []
        with self._locked():
            if not (folder / FOUND).exists():
                self._train()
                for command in filter(None, (make, evaluate)):
                    if not (trained / FAILED).exists():
                        self._do(command, folder if command is evaluate else trained)
        if (trained / FAILED).exists():
            return self._read(trained / FAILED, "failed")
        return self._read(folder / FOUND, *PARTS) | {"late": late(trained / "metrics.jsonl")}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with its folder: models that are made of one run wait for it here."""
        try:
            self.trained.mkdir(parents=True, exist_ok=True)
            with FileLock(self.trained / ".table"):
                yield
        except OSError as error:
            raise InputError(f"{error.filename or self.folder}: {error.strerror}") from None

    def _train(self) -> None:
        trained = self.trained.absolute()
        command = [sys.executable, str(ROOT / "pipeline/train.py"), "--config", str(ROOT / self.config), *self.options]
        if not self.ended:
            self._do([*command, f"--run.path={trained}", "--train.threads=1", "--report.pictures=0"], trained)
        if not (trained / FAILED).exists():
            (trained / TRAINED).touch()

    def _do(self, command: list[str], folder: Path) -> None:
        """Run it, its log in `folder`. Raises InputError where it fails, unless the training diverged: see FAILED."""
        (self.trained / "asked.json").write_text(json.dumps(self.settings, indent=1) + "\n")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "pipeline")}
        with (folder / "log").open("a") as log:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
        if done.returncode:
            last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
            if not "".join(last).startswith("train: diverged: "):
                raise InputError(f"exit code {done.returncode}: {' '.join(command)}; see {folder / 'log'}: {last}")
            (folder / FAILED).write_text(json.dumps({"failed": last[0]}) + "\n")

    def _read(self, file: Path, *parts: str) -> Record:
        try:
            found: Record = json.loads(file.read_text())
            if missing := set(parts) - set(found):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file}: {error}: remove {self.folder}, and it is trained anew") from None
        return found


def late(metrics: Path) -> float | None:
    """How much the loss still varies: the deviation from a straight line over the last tenth of the rounds, at least
    five, as a share of the mean size of the loss there. None for a run too short to say, or that overflowed there.
    """
    try:
        rounds = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses = [float(line["loss/total"]) for line in rounds if line.get("loss/total") is not None]
    except (OSError, ValueError, TypeError, AttributeError):  # cut, or not a run's
        return None
    last = losses[-max(5, len(losses) // 10) :]
    if len(last) < 3 or not all(map(math.isfinite, last)) or not any(last):
        return None
    slope, start = linear_regression(range(len(last)), last)
    return stdev(loss - slope * at - start for at, loss in enumerate(last)) / mean(abs(loss) for loss in last)


def check_place(to: Path) -> None:
    """InputError where no table can be written."""
    if to.name in ("", "..") or to.suffix:
        raise InputError(f"--to {to}: give a file's name without an ending, as benchmarks/results/mine")
    if blocked := next((folder for folder in to.parents if folder.exists() and not folder.is_dir()), None):
        raise InputError(f"--to {to}: {blocked} is a file")


def stored(to: Path, rows: type) -> Record:
    """What the table at `to` rests on, its rows all of one type; {} before it is made.

    InputError where none can stand there, or something else does: before hours of training.
    """
    check_place(to)
    file = to.with_suffix(".json")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: {error}: move it away, or write --to another place") from None
    if not isinstance(found, dict) or not all(isinstance(row, rows) for row in found.values()):
        raise InputError(f"{file} is not what a table rests on: move it away, or write --to another place")
    return found


def by_run(rows: Record, parts: Iterable[str]) -> dict[str, Record]:
    """The records of a table's rows by run, but for those that lack some of the parts, as of files of another kind."""
    lists, needed = [row for row in rows.values() if isinstance(row, list)], set(parts)
    return {
        one["run"]: one
        for one in itertools.chain.from_iterable(lists)
        if isinstance(one, dict) and isinstance(one.get("run"), str) and ("failed" in one or needed <= {*one})
    }


def beside(to: Path, parts: Iterable[str]) -> dict[str, Record]:
    """What tables in the folder of `to` rest on, by run: its own folder may be gone, its numbers are not."""
    found = dict[str, Record]()
    for file in sorted(to.parent.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            rows = json.loads(file.read_text())
            found |= by_run(rows, parts) if isinstance(rows, dict) else {}
    return found


def measure_all(tasks: dict[str, Task], jobs: int) -> Iterator[tuple[str, Record]]:
    """Each task's name and record, as they are done, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), unit="run") as bar:
        running = {pool.submit(task.measure): name for name, task in tasks.items()}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fingerprint(settings: Record) -> str:
    """Eight digits that stand for all of them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def spread(found: Iterable[float | None], digits: int) -> str:
    """Mean and standard deviation, or the one value there is."""
    values = [value for value in found if value is not None]
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def seeds_of(good: int, lost: int = 0) -> str:
    """What a row of a table rests on."""
    return f" ({good} seed{'s'[: good != 1]}" + (f"; {lost} of {good + lost} diverged)" if lost else ")")


def command() -> str:
    """The one that runs, to stand above its table."""
    return f"`{shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def page(title: str, titles: list[str], rows: list[list[str]]) -> str:
    """A table below its title and the command that made it."""
    return f"{title}\n\n{command()}\n\n{table(titles, rows)}\n"


def write(to: Path, text: str, found: object) -> None:
    """A table beside what it rests on."""
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    write_atomically(to.with_suffix(".md"), text)


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a record."""

    title: str
    get: Callable[[Record], float | None]
    """None where a record has no such number, as modes of data without labels."""
    digits: int


def _restored(kind: str) -> Column:
    return Column(
        kind.replace("_", " "),
        lambda record: float(record["restoration"][kind]["once"]) if record["restoration"] else None,
        3,
    )


def _overlap(name: str) -> Column:
    return Column(name, lambda record: float(record["coverage"][name]), 2)


def _of_latents(name: str) -> Column:
    return Column(f"{name} of z", lambda record: record["coverage"].get("latents", {}).get(name), 2)


def _cost(title: str, part: str) -> Column:
    """Processor seconds of 10,000 samples."""

    def get(record: Record) -> float | None:
        cost = record.get("sampling") or {}
        return cost[part] / cost["samples"] * 10_000 if cost.get(part) is not None else None

    return Column(title, get, 1)


def _upside_down(title: str, score: str) -> Column:
    """AUROC of test images against themselves upside down; None where f repairs nothing, or the record lacks it."""

    def get(record: Record) -> float | None:
        value: float | None = ((record["density"] or {}).get(score) or {}).get("upside down")
        return value

    return Column(title, get, 3)


KINDS = ("blur", "noise", "salt_pepper", "rows")
COLUMNS = {
    "once": Column("FD f(z), × floor", lambda record: record["fd"]["once_ratio"], 1),
    "twice": Column("FD f(f(z)), × floor", lambda record: record["fd"]["twice_ratio"], 1),
    "second": Column(
        "FD f(z), × floor, on a second encoder", lambda record: (record.get("second") or {}).get("once_ratio"), 1
    ),
    "latents": Column("FD of z where f decodes it, × floor", lambda record: record["fd"].get("latents_ratio"), 1),
    **{f"latents_{name}": _of_latents(name) for name in ("precision", "recall", "density", "coverage")},
    "fd_once": Column("FD f(z)", lambda record: float(record["fd"]["once"]), 0),
    "fd_twice": Column("FD f(f(z))", lambda record: float(record["fd"]["twice"]), 0),
    "rarest": Column("rarest class, %", lambda record: 100 * min(record["modes"]) if record["modes"] else None, 1),
    "commonest": Column("commonest, %", lambda record: 100 * max(record["modes"]) if record["modes"] else None, 1),
    **{name: _overlap(name) for name in ("precision", "recall", "density", "coverage")},
    **{kind: _restored(kind) for kind in KINDS},
    "reconstruction": Column("reconstruction", lambda record: float(record["reconstruction"]), 3),
    "idempotence": Column("idempotence", lambda record: float(record["idempotence"]["samples"]), 3),
    "upside_down": _upside_down("upside down, AUROC", "energy"),
    "upside_down_twice": _upside_down("of f twice", "twice"),
    "copying": Column("distance to training, × test's", lambda record: record["nearest"]["ratio"], 2),
    "asked": Column("as asked, %", lambda record: 100 * record["asked"]["share"] if record.get("asked") else None, 1),
    "late": Column("late loss, spread", lambda record: record["late"], 3),
    "images": Column("images seen, 10³", lambda record: record["images_seen"] / 1000, 0),
    "training": Column("training, processor s", lambda record: record.get("cpu_seconds"), 0),
    "sampling": _cost("10,000 f(z), processor s", "cpu_seconds"),
    "latents_sampling": _cost("10,000 z, processor s", "latents_cpu_seconds"),
    "minutes": Column("core minutes", lambda of: of["cpu_seconds"] / 60 if of.get("cpu_seconds") else None, 1),
}
"""By the names that tables ask for."""


def packed(path: str, *arguments: str) -> str:
    """The packed data set at `path` below the repository, made by `naign pack ARGUMENTS` unless it has been already."""
    folder, wanted = ROOT / path, " ".join(arguments)
    said = folder.parent / f"{folder.name}.packed"
    if not ((folder / "index.json").exists() and said.exists() and said.read_text() == wanted):
        command = [sys.executable, "-m", "naign.cli", "pack", *arguments, "--to", path]
        found = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline")}
        if subprocess.run(command, cwd=ROOT, env=found, check=False).returncode:
            raise InputError(f"{path} cannot be packed: see above")
        said.write_text(wanted)
    return path
