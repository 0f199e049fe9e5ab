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

from pipeline.checkpoint.done import count_network_rounds, is_done
from pipeline.checkpoint.manifest import BEST, MANIFEST, by_step
from pipeline.errors import InputError, printable, require

MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")
"""A folder with one of them is a run."""

COUNTS = ("train.images", "train.passes", "match.round", "quality.patience", "quality.rounds")
"""Settings that decide when a run is done."""

LARGEST = 2**62  # count of images
DEPTH = 3  # levels of folders that are searched for runs, and of sections in a configuration
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError)
"""What parsing a foreign file raises."""


@dataclass(kw_only=True)
class Run:
    """A run, as its folder describes it."""

    name: str  # path below the folder that was searched
    path: str
    state: str  # training, done, stopped; unknown: a copy of the metrics alone
    images_seen: int
    images: int  # that f is trained on in all, in whole rounds
    fd: float | None  # Frechet distance of f(z)
    fd_over_floor: float | None  # None while training, when no floor is measured
    recall: float | None
    measured: str | None  # evaluation or training; None: never
    measured_at: int | None  # images seen then
    bytes: int  # of all files
    age_seconds: float  # since the last report


def folder_of(run: str) -> str:
    """The folder of a run, a checkpoint or a model, which may be given by its file; addresses stay as they are."""
    return str(Path(run).parent) if Path(run).is_file() else run.rstrip("/")


def find_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs in a folder, or the folder itself, by name; and why other folders are none, by their path.

    Raises InputError where there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"no folder '{folder}': give one that holds runs, such as runs/")
    runs, others = list[Run](), dict[str, str]()
    for place in _places(folder, DEPTH):
        try:
            runs.append(read_run(place, str(place.relative_to(folder)) if place != folder else folder.resolve().name))
        except (InputError, OSError) as error:
            others[str(place)] = printable(str(error))
    return runs, others


def _places(folder: Path, depth: int) -> Iterator[Path]:
    """Runs at or below a folder, in order, and folders in which there is none."""
    inside: list[Path] = []
    if depth and not is_run(folder) and not os.path.exists(folder / "model.safetensors"):
        with suppress(OSError):  # a folder that may not be listed
            inside = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    if not inside:
        yield folder
    for path in inside:
        yield from [path] if os.path.islink(path) else _places(path, depth - 1)


def is_run(folder: Path) -> bool:
    """Whether the folder has one of MARKS."""
    return any(os.path.exists(folder / name) for name in MARKS)


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder. Raises InputError, saying what the folder is instead, where it is no run."""
    if not is_run(folder):
        require(
            (os.path.isdir(folder), "no such folder"),
            (os.access(folder, os.R_OK | os.X_OK), "it cannot be read: check its owner and mode"),
        )
        model = os.path.exists(folder / "model.safetensors")
        raise InputError("no run, but an exported model" if model else "no run in it")
    settings = read_settings(folder)
    settings |= {key: whole(settings.get(key)) for key in COUNTS}
    known = all(settings[key] for key in ("train.images", "match.round", "train.passes"))
    require((known, "config.yaml does not say how many images the run is for"))
    settings["prior.alone"] = min(1.0, max(0.0, number(settings.get("prior.alone")) or 0.0))
    last, measured = _last_lines(folder / "metrics.jsonl")
    checkpoint = _newest_trainer(folder)
    seen = max(whole(last.get("images_seen")), whole((checkpoint or {}).get("images_seen")))
    rounds = whole(checkpoint.get("round")) if checkpoint else whole(last["round"]) + 1 if "round" in last else 0
    quality = _quality(read_json(folder / "evaluation/metrics.json"), measured)
    reported = number(last.get("time")) or (folder / "config.yaml").stat().st_mtime
    return Run(
        name=name,
        path=str(folder),
        state=_state(folder, settings, checkpoint, rounds),
        images_seen=seen,
        images=count_network_rounds(settings) * settings["match.round"] * settings["train.passes"],
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


def parse_line(line: bytes | str) -> dict[str, Any]:
    """A line of metrics.jsonl; {} for one that a kill cut short."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file; {} where it is missing or none."""
    try:
        return parse_line(file.read_bytes())
    except OSError:
        return {}


def number(value: Any) -> float | None:
    """A value if it is a finite number, else None."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return value if real and abs(value) < 1e300 else None


def whole(value: Any) -> int:
    """A count; 0 for what is none."""
    return value if type(value) is int and 0 <= value < LARGEST else 0


def pick(content: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as fd.once; None where there is none."""
    value: Any = content
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _last_lines(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last report, and the last with quality/*."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return {}, {}
    last = next(filter(None, map(parse_line, reversed(lines[-2:]))), {})  # a kill may have cut the last one short
    return last, parse_line(next((line for line in reversed(lines) if b'"quality/fd"' in line), b""))


def _newest_trainer(folder: Path) -> dict[str, Any] | None:
    """trainer.json of the newest complete checkpoint; None without checkpoints/."""
    place = folder / "checkpoints"
    if not os.path.isdir(place):
        return None
    names = by_step(path.name for path in place.iterdir() if (path / MANIFEST).is_file())
    return read_json(place / names[0] / "trainer.json") if names else {}


def _state(folder: Path, settings: Mapping[str, Any], checkpoint: dict[str, Any] | None, rounds: int) -> str:
    if _in_use(folder / ".lock"):
        return "training"
    if is_done(settings, rounds, read_json(folder / BEST)):
        return "done"
    return "unknown" if checkpoint is None and not os.path.exists(folder / ".lock") else "stopped"


def _in_use(lock: Path) -> bool:
    """Whether a training holds the lock of its folder. Takes a shared lock and releases it at once."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _quality(evaluation: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Quality by metrics.json of the evaluation, or else by the last report with quality/*."""
    evaluated = pick(evaluation, "fd.once"), pick(evaluation, "coverage.recall")
    trained = report.get("quality/fd"), report.get("quality/recall")
    for source, line, (fd, recall) in (("evaluation", evaluation, evaluated), ("training", report, trained)):
        if number(fd) is not None:
            return {
                "fd": number(fd),
                "fd_over_floor": number(pick(line, "fd.once_ratio")),
                "recall": number(recall),
                "measured": source,
                "measured_at": whole(line.get("images_seen")) or None,
            }
    return dict.fromkeys(("fd", "fd_over_floor", "recall", "measured", "measured_at"))


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # a training has removed it
                total += os.lstat(os.path.join(place, name)).st_size
    return total
