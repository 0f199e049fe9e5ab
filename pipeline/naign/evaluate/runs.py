"""Run folders on a disk: state, images seen, quality, size, age. Files may be damaged or foreign. Without torch."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from naign.checkpoint.manifest import MANIFEST, by_step
from naign.errors import InputError, printable, require
from naign.settings.budget import count_rounds, is_done

MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")
"""A folder with one of them is a run."""

QUALITY = {
    "evaluation": {"fd": "fd.once", "fd_over_floor": "fd.once_ratio", "recall": "coverage.recall"},  # of metrics.json
    "training": {"fd": "quality/fd", "recall": "quality/recall"},  # of a line of metrics.jsonl
}
"""Keys of the Frechet distance of f(z), of that over its floor, and of recall, by the field of a Run."""

MOST = 2**62  # images of a run
DEPTH = 3  # levels of folders that are searched for runs, and of sections in a configuration
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
    measured_at: int | None = None  # images seen then
    bytes: int  # of all files
    age_seconds: float  # since the last report


def folder_of(run: str) -> str:
    """The folder of a run, a checkpoint or a model, which may be given by its file; addresses stay as they are."""
    return str(Path(run).parent) if Path(run).is_file() else run.rstrip("/")


def find_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs at or below a folder, and what is wrong with the damaged ones, by path; InputError for no folder."""
    fetch = "`naign fetch` copies what a run in a bucket reports"
    require((folder.is_dir(), f"no folder '{printable(str(folder))}': give a local one that holds runs; {fetch}"))
    runs, others = list[Run](), dict[str, str]()
    for place in _runs_in(folder):
        try:
            runs.append(read_run(place, str(place.relative_to(folder)) if place != folder else folder.resolve().name))
        except (InputError, OSError) as error:
            others[str(place)] = printable(str(error))
    return runs, others


def _runs_in(folder: Path) -> Iterator[Path]:
    """Folders with MARKS at or below a folder, in order; not those below another one."""
    for place, folders, _ in os.walk(folder, followlinks=True):
        path = Path(place)
        if run := is_run(path):
            yield path
        ended = run or len(path.relative_to(folder).parts) == DEPTH
        folders[:] = [] if ended else sorted(name for name in folders if not name.startswith("."))


def is_run(folder: Path) -> bool:
    """Whether the folder has one of MARKS."""
    return any(os.path.exists(folder / name) for name in MARKS)


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder. Raises InputError where it is no run, or a damaged one, and OSError as files do."""
    if not is_run(folder):
        model = "model.safetensors" in os.listdir(folder)
        raise InputError("no run, but an exported model" if model else "no run in it")
    settings = read_settings(folder)
    kept = any(os.path.exists(folder / name) for name in ("checkpoints", ".lock"))  # else a copy of the reports
    try:
        file = folder / "metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.exists() else []
        if lines and not lines[-1].endswith(b"}"):
            lines.pop()  # a kill has cut it short
        last = read_json(file, lines[-1] if lines else b"")
        measured = read_json(file, next((line for line in reversed(lines) if b'"quality/fd"' in line), b""))
        names = by_step(file.parent.name for file in folder.glob(f"checkpoints/*/{MANIFEST}"))
        trainer = read_json(folder / "checkpoints" / names[0] / "trainer.json") if names else {}
        seen = max(int(line.get("images_seen", 0)) for line in (last, trainer))
        images = count_rounds(settings) * int(settings["match.round"]) * int(settings["train.passes"])
        done = is_done(settings, trainer if kept else last)
        ended = "done" if done else "stopped" if kept else "unknown"
        quality = _quality({"evaluation": flat(read_json(folder / "evaluation/metrics.json")), "training": measured})
    except MALFORMED as error:
        raise InputError(f"its files are not those of a run ({type(error).__name__}: {error})") from None
    require((0 < images < MOST, "config.yaml does not say how many images the run is for"))
    reported = max(0.0, number(last.get("time")) or (folder / "config.yaml").stat().st_mtime)
    return Run(
        name=name,
        path=str(folder),
        state="training" if _in_use(folder / ".lock") else ended,
        images_seen=seen,
        images=images,
        **quality,
        bytes=_size(folder),
        age_seconds=round(max(0.0, time.time() - reported), 1),
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """{'section.key': value} of config.yaml. Raises InputError where it is missing or malformed."""
    try:
        return flat(yaml.safe_load((folder / "config.yaml").read_bytes()))
    except FileNotFoundError:
        raise InputError("no config.yaml") from None
    except MALFORMED as error:
        raise InputError(f"config.yaml is no configuration ({type(error).__name__})") from None


def flat(section: Mapping[str, Any], prefix: str = "", depth: int = DEPTH) -> dict[str, Any]:
    """Nested sections as {'section.key': value}; deeper ones, which aliases can repeat without end, as "..."."""
    settings: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and depth:
            settings |= flat(value, f"{prefix}{key}.", depth - 1)
        else:
            plain = isinstance(value, str | float | None) or isinstance(value, int) and abs(value) <= 2**63
            settings[f"{prefix}{key}"] = value if plain else "..."
    return settings


def read_json(file: Path, line: bytes | None = None) -> dict[str, Any]:
    """The JSON object in a file, or in one line of it; {} where there is none. Raises InputError for anything else."""
    try:
        text = line or (file.read_bytes() if line is None and file.exists() else b"{}")
        return dict(json.loads(text).items())
    except MALFORMED as error:
        raise InputError(f"{file} holds no JSON object ({type(error).__name__}): remove it, or copy it again") from None


def number(value: Any) -> float | None:
    """A value if it is a finite number, else None."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return value if real and abs(value) < 1e300 else None


def _in_use(lock: Path) -> bool:
    """Whether a training holds the lock of its folder. Takes a shared lock and releases it at once."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _quality(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Quality by the evaluation, or else by the last report with quality/*."""
    for source, keys in QUALITY.items():
        values = {name: number(lines[source].get(key)) for name, key in keys.items()}
        if values["fd"] is not None:
            return values | {"measured": source, "measured_at": number(lines[source].get("images_seen"))}
    return {}


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # a training has removed it
                total += os.lstat(os.path.join(place, name)).st_size
    return total
