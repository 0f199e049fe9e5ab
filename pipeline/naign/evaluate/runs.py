"""Run folders on a disk: state, images seen, quality, size, age. Files may be damaged or foreign. Without torch."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from naign.checkpoint.manifest import MANIFEST, by_step
from naign.errors import InputError, printable
from naign.settings.budget import count_rounds, is_done

MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")
"""A folder with one of them is a run."""

MOST = 2**62  # images of a run
DEPTH = 3  # levels of folders that are searched for runs
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, yaml.YAMLError)
"""What reading a damaged or foreign file raises."""


@dataclass(kw_only=True)
class Run:
    """A run, as its folder describes it."""

    name: str  # path below the folder that was searched
    path: str
    state: str  # training, done, stopped; unknown: a copy of the metrics alone
    images_seen: int
    images: int  # that f is trained on in all, in whole rounds
    fd: float | None = None  # Frechet distance of f(z)
    fd_over_floor: float | None = None  # None while training, when no floor is measured
    recall: float | None = None
    measured: str | None = None  # evaluation or training; None: never
    measured_at: float | None = None  # images seen then
    bytes: int  # of all files
    age_seconds: float  # since the last report


def folder_of(run: str) -> str:
    """The folder of a run, a checkpoint or a model, which may be given by its file; addresses stay as they are."""
    path = Path(run)
    if path.is_file():
        return str(path.parent)
    return run.rstrip("/")


def find_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs at or below a folder, and what is wrong with the damaged ones, by path; InputError for no folder."""
    if not folder.is_dir():
        fetch = "`naign fetch` copies what a run in a bucket reports"
        raise InputError(f"no folder '{printable(str(folder))}': give a local one that holds runs; {fetch}")
    runs = []
    others = {}
    for place in _run_folders(folder):
        name = str(place.relative_to(folder))
        if place == folder:
            name = folder.resolve().name
        try:
            runs.append(_read_run(place, name))
        except (OSError, *MALFORMED) as error:
            text = f"its files are not those of a run ({type(error).__name__}: {error})"
            others[str(place)] = printable(text)
    return runs, others


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders with MARKS at or below a folder, in order; not those below another one."""
    for place, folders, _ in os.walk(folder, followlinks=True):
        path = Path(place)
        if is_run(path):
            yield path
            folders.clear()
        if len(path.relative_to(folder).parts) == DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def is_run(folder: Path) -> bool:
    """Whether the folder has one of MARKS."""
    return any(os.path.exists(folder / name) for name in MARKS)


def _read_run(folder: Path, name: str) -> Run:
    """The run in a folder. Raises OSError or one of MALFORMED for a damaged one."""
    config = yaml.safe_load((folder / "config.yaml").read_bytes())
    train = config["train"]
    settings = {
        "train.images": train["images"],
        "train.passes": train["passes"],
        "match.round": config["match"]["round"],
    }
    images = count_rounds(settings) * int(settings["match.round"]) * int(settings["train.passes"])
    if not 0 < images < MOST:
        raise ValueError("config.yaml does not say how many images the run is for")
    last, measured = _reports(folder / "metrics.jsonl")
    trainer = {}
    checkpoints = by_step(file.parent.name for file in folder.glob(f"checkpoints/*/{MANIFEST}"))
    if checkpoints:
        trainer = _read_json(folder / "checkpoints" / checkpoints[0] / "trainer.json")
    state = "unknown"
    if any(os.path.exists(folder / kept) for kept in ("checkpoints", ".lock")):
        state = "stopped"
    if is_done(settings, trainer):
        state = "done"
    if _in_use(folder / ".lock"):
        state = "training"
    reported = number(last.get("time")) or (folder / "config.yaml").stat().st_mtime
    return Run(
        name=name,
        path=str(folder),
        state=state,
        images_seen=max(int(last.get("images_seen", 0)), int(trainer.get("images_seen", 0))),
        images=images,
        **_quality(_read_json(folder / "evaluation/metrics.json"), measured),
        bytes=_size(folder),
        age_seconds=round(max(0.0, time.time() - max(0.0, reported)), 1),
    )


def _reports(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last report in metrics.jsonl, and the last one that measured quality; {} where there is none."""
    last = b"{}"
    measured = b"{}"
    if file.exists():
        for line in file.read_bytes().splitlines():
            if line.endswith(b"}"):  # else a kill has cut it short
                last = line
                if b'"quality/fd"' in line:
                    measured = line
    return _parse(last, file), _parse(measured, file)


def _quality(evaluation: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Run: quality by metrics.json of an evaluation, or else by a report of the training."""
    fd = evaluation.get("fd", {})
    if number(fd.get("once")) is not None:
        return {
            "measured": "evaluation",
            "measured_at": number(evaluation.get("images_seen")),
            "fd": fd["once"],
            "fd_over_floor": number(fd.get("once_ratio")),
            "recall": number(evaluation.get("coverage", {}).get("recall")),
        }
    if number(training.get("quality/fd")) is not None:
        return {
            "measured": "training",
            "measured_at": number(training.get("images_seen")),
            "fd": training["quality/fd"],
            "recall": number(training.get("quality/recall")),
        }
    return {}


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file. Raises InputError for anything else."""
    if file.exists():
        return _parse(file.read_bytes(), file)
    return {}


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text).items())
    except MALFORMED as error:
        raise InputError(f"{file} holds no JSON object ({type(error).__name__}): remove it, or copy it again") from None


def number(value: Any) -> float | None:
    """A value if it is a finite number, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return value
    return None


def _in_use(lock: Path) -> bool:
    """Whether a training holds the lock of its folder. Takes a shared lock and releases it at once."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # a training has removed it
                total += os.lstat(os.path.join(place, name)).st_size
    return total
