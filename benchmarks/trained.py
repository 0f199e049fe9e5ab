"""Networks that tables compare: each is trained and measured once, whichever table asks first."""

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from output import ROOT, Record
from tqdm import tqdm

from naign.config import changeable, flatten, parse
from naign.errors import InputError
from naign.settings.constraints import FREE

METRICS = "evaluation/metrics.json"
"""What `naign evaluate` found, in a run's folder."""
MORE = "evaluation/samples.json"
"""What benchmarks/samples.py found, likewise."""
FAILED = "failed.json"
"""Written there if the training diverged."""
TRAINED = "trained"
"""Written there at the end of the training."""


@dataclass(frozen=True, slots=True)
class Task:
    """A network to train and measure."""

    folder: Path
    """Of what is measured: the run, or a model that is made from it. It may be removed once its numbers are kept."""
    trained: Path
    """Of the run."""
    config: str
    """Path in the repository."""
    options: tuple[str, ...]
    then: tuple[str, ...] = ()
    """Arguments of `python -m` that make the measured model; the run's folder and --to are appended."""

    @classmethod
    def of(
        cls,
        runs: Path,
        config: str,
        options: Iterable[object],
        seed: int,
        then: Iterable[str] = (),
    ) -> "Task":
        """A task in a folder of `runs` that is named after every setting that changes what is computed.

        Tables that ask for the same network share it. Raises InputError if the configuration is invalid.
        """
        words = (*map(str, options), f"--seed={seed}")
        try:
            parsed = parse([f"--config={ROOT / config}", *words])
        except SystemExit:  # --help, or an option that does not exist
            raise InputError(f"{shlex.join([config, *words])} is not a valid configuration") from None
        free = changeable(parsed, FREE) - {"train.precision"}
        settings = flatten(parsed)
        for key in free:
            settings.pop(key, None)
        name = f"{Path(config).stem}-seed-{seed}-{fingerprint(settings)}"
        steps = tuple(then)
        measured = f"{name}-{fingerprint(steps)}" if steps else name
        return cls(
            folder=runs / measured,
            trained=runs / name,
            config=config,
            options=words,
            then=steps,
        )

    @property
    def diverged(self) -> bool:
        return (self.trained / FAILED).exists()

    @property
    def measured(self) -> bool:
        """Whether its numbers exist, or it diverged."""
        return self.diverged or ((self.folder / METRICS).exists() and (self.folder / MORE).exists())

    @property
    def ended(self) -> bool:
        """Whether it is trained, or diverged."""
        return self.diverged or (self.trained / TRAINED).exists()

    def train(self) -> None:
        """Train it unless that is done: one process of one thread, continuing from its newest checkpoint."""
        with self._locked():
            self._train()

    def measure(self) -> Record:
        """The numbers of `naign evaluate` and of samples.py, after training if needed; {"failed": reason} if it
        diverged.

        Raises InputError if a command fails, or the folder cannot be used.
        """
        with self._locked():
            if not self.measured:
                self._train()
                self._evaluate()
        files = [self.trained / FAILED]
        if not self.diverged:
            files = [self.folder / METRICS, self.folder / MORE]
        found: Record = {}
        try:
            for file in files:
                found |= json.loads(file.read_text())
            if "failed" in found or "fd" in found:
                return found
        except (OSError, ValueError, TypeError):
            pass
        raise InputError(f"{file} is damaged: remove {self.folder}, and it is trained anew")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the run's folder: models that are made from one run wait here."""
        try:
            self.trained.mkdir(parents=True, exist_ok=True)
            with FileLock(self.trained / ".table"):
                yield
        except OSError as error:
            raise InputError(f"{error.filename or self.folder}: {error.strerror}") from None

    def _train(self) -> None:
        if self.ended:
            return
        command = [
            sys.executable,
            str(ROOT / "pipeline/train.py"),
            f"--config={ROOT / self.config}",
            *self.options,
            f"--run.path={self.trained.absolute()}",
            "--train.threads=1",
            "--report.pictures=0",
        ]
        self._run(command, self.trained)
        if not self.diverged:
            (self.trained / TRAINED).touch()

    def _evaluate(self) -> None:
        if self.diverged:
            return
        folder = str(self.folder.absolute())
        python = [sys.executable, "-m"]
        if self.then:
            run = str(self.trained.absolute())
            self._run([*python, *self.then, run, f"--to={folder}"], self.trained)
        if not (self.folder / METRICS).exists():
            self._run([*python, "naign.cli", "evaluate", folder], self.folder)
        self._run([sys.executable, str(ROOT / "benchmarks/samples.py"), folder], self.folder)

    def _run(self, command: list[str], folder: Path) -> None:
        """Run a command that logs to `folder`; writes FAILED if a training diverged, raises InputError if it failed."""
        with (folder / "log").open("a") as log:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
                check=False,
            )
        if not done.returncode:
            return
        text = (folder / "log").read_text(errors="replace")
        last = text.strip().rpartition("\n")[2]
        if not last.startswith("train: diverged: "):
            raise InputError(f"exit code {done.returncode}: {' '.join(command)}; see {folder / 'log'}: {last}")
        failed = json.dumps({"failed": last})
        (folder / FAILED).write_text(failed + "\n")


def environment() -> dict[str, str]:
    """The environment of a program of this repository with one thread."""
    found = dict(os.environ)
    found["OMP_NUM_THREADS"] = "1"
    found["PYTHONPATH"] = str(ROOT / "pipeline")
    return found


def fingerprint(settings: object) -> str:
    """Eight hexadecimal digits of a hash."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def measure_all(tasks: dict[str, Task], jobs: int) -> Iterator[tuple[str, Record]]:
    """Each task's name and numbers as they are done, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), unit="run") as bar:
        running = {pool.submit(task.measure): name for name, task in tasks.items()}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def packed(path: str, *arguments: str) -> str:
    """The data set at `path` in the repository, packed by `naign pack ARGUMENTS` unless that was done."""
    folder = ROOT / path
    note = folder.parent / f"{folder.name}.packed"
    wanted = " ".join(arguments)
    done = note.read_text() if note.exists() else ""
    if (folder / "index.json").exists() and done == wanted:
        return path
    command = [sys.executable, "-m", "naign.cli", "pack", *arguments, "--to", path]
    packing = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
    if packing.returncode:
        raise InputError(f"{path} cannot be packed: see above")
    note.write_text(wanted)
    return path
