"""Run folders as they lie on a disk: state, images seen, quality, size, age. Their files are untrusted; no torch."""

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.done import is_done
from pipeline.checkpoint.manifest import BEST, MANIFEST, by_step
from pipeline.errors import InputError, printable, require

MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")
"""A folder with one of them is a run."""

COUNTS = ("train.images", "train.passes", "match.round", "quality.patience", "quality.rounds")
"""Settings that decide when a run is done."""

SETTINGS = 10_000  # of a configuration, at most, sections counted
LARGEST = 2**62  # count of images
DEPTH = 3  # folders below the given one that are searched for runs
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError)
"""What parsing a file raises that this program did not write."""


@dataclass(kw_only=True)
class Run:
    """A run, as its folder describes it."""

    name: str  # path below the folder that was searched
    path: str
    state: str  # training, done, stopped; unknown: a copy of the metrics alone
    images_seen: int
    images: int  # budget, in whole rounds
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
        except (*MALFORMED, OverflowError) as error:  # a foreign folder may hold anything
            others[str(place)] = f"it cannot be read ({type(error).__name__})"
    return runs, others


def _places(folder: Path, depth: int) -> Iterator[Path]:
    """Runs at or below a folder, in order, and folders in which there is none."""
    if is_run(folder) or depth == 0:
        yield folder
        return
    try:
        inside = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    except OSError:
        inside = []
    model = os.path.exists(folder / "model.safetensors")
    if not inside or model:
        yield folder
    for path in inside if not model else ():
        yield from [path] if os.path.islink(path) else _places(path, depth - 1)


def is_run(folder: Path) -> bool:
    """Whether the folder has one of MARKS."""
    return any(os.path.exists(folder / name) for name in MARKS)


def read_run(folder: Path, name: str) -> Run:
    """Raises InputError, saying what the folder is instead, where it is no run."""
    if not is_run(folder):
        require(
            (os.path.isdir(folder), "no such folder"),
            (os.access(folder, os.R_OK | os.X_OK), "it cannot be read: check its owner and mode"),
        )
        model = os.path.exists(folder / "model.safetensors")
        raise InputError("no run, but an exported model" if model else "no run in it")
    settings = read_settings(folder)
    try:
        batch = int(settings["match.round"]) * int(settings["train.passes"])
        images = -(-int(settings["train.images"]) // batch) * batch
        require((0 < batch < LARGEST and 0 <= images < LARGEST, "no such run can be"))
    except (*MALFORMED, ZeroDivisionError, OverflowError):
        raise InputError("config.yaml does not say how many images the run is for") from None
    last, measured = _last_lines(folder / "metrics.jsonl")
    checkpoint = _newest_trainer(folder)
    seen = max(whole(last.get("images_seen")), whole((checkpoint or {}).get("images_seen")))
    rounds = whole(checkpoint.get("round")) if checkpoint else whole(last["round"]) + 1 if "round" in last else 0
    quality = _evaluated(folder) or _measured(measured)
    reported = number(last.get("time")) or (folder / "config.yaml").stat().st_mtime
    return Run(
        name=name,
        path=str(folder),
        state=_state(folder, settings, checkpoint, rounds),
        images_seen=seen,
        images=images,
        **quality,
        bytes=_size(folder),
        age_seconds=round(max(0.0, time.time() - reported), 1),
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """{'section.key': value} of config.yaml. Raises InputError where it is missing or malformed."""
    try:
        content = yaml.safe_load(regular(folder / "config.yaml").read_bytes())
        return flat(content.items())
    except FileNotFoundError:
        raise InputError("no config.yaml") from None
    except MALFORMED as error:
        raise InputError(f"config.yaml is no configuration ({type(error).__name__})") from None


def flat(items: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """Nested sections as {'section.key': value}, at most SETTINGS of them: aliases can make a small YAML file huge."""
    return {key: value for key, value in islice(_nodes(items, ""), SETTINGS) if not isinstance(value, dict)}


def _nodes(items: Iterable[tuple[Any, Any]], prefix: str) -> Iterator[tuple[str, Any]]:
    """Settings, and the sections they are in: aliases can repeat empty ones without end."""
    for key, value in items:
        if isinstance(value, dict):
            yield f"{prefix}{key}", value
            yield from _nodes(value.items(), f"{prefix}{key}.")
        else:
            shown = isinstance(value, str | float | None) or isinstance(value, int) and abs(value) <= 2**63
            yield f"{prefix}{key}", value if shown else "..."


def regular(file: Path) -> Path:
    """The file itself. Raises OSError for what is there but no file, such as a pipe, which would be waited for."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise OSError(errno.EINVAL, "no regular file", str(file))
    return file


def parse_line(line: bytes | str) -> dict[str, Any]:
    """A line of metrics.jsonl; {} for one that a kill cut short."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file; {} where it is missing or none."""
    try:
        return parse_line(regular(file).read_bytes())
    except OSError:
        return {}


def number(value: Any) -> float | None:
    """A value if it is a finite number, else None."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real and abs(value) < 1e300 and math.isfinite(value) else None


def whole(value: Any) -> int:
    """A count; 0 for what is none."""
    return value if type(value) is int and 0 <= value < LARGEST else 0


def pick(content: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as fd.once; None where there is none."""
    found: Any = content
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _last_lines(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last report, and the last with quality/*."""
    last: dict[str, Any] = {}
    measured, before, newest = b"", b"", b""
    try:
        with regular(file).open("rb") as lines:
            for line in lines:
                before, newest = newest, line
                measured = line if b'"quality/fd"' in line else measured
    except OSError:
        pass
    last = parse_line(newest) or parse_line(before)
    return last, parse_line(measured)


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
    counts = {key: whole(settings.get(key)) for key in COUNTS}
    if is_done({**settings, **counts}, rounds, read_json(folder / BEST)):
        return "done"
    return "unknown" if checkpoint is None and not os.path.exists(folder / ".lock") else "stopped"


def _in_use(lock: Path) -> bool:
    """Whether a training holds the lock of its folder. It is asked for shared, and let go of at once."""
    import fcntl

    try:
        with regular(lock).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _evaluated(folder: Path) -> dict[str, Any] | None:
    metrics = read_json(folder / "evaluation/metrics.json")
    if number(pick(metrics, "fd.once")) is None:
        return None
    paths = {"fd": "fd.once", "fd_over_floor": "fd.once_ratio", "recall": "coverage.recall"}
    found: dict[str, Any] = {name: number(pick(metrics, path)) for name, path in paths.items()}
    return found | {"measured": "evaluation", "measured_at": whole(metrics.get("images_seen")) or None}


def _measured(line: Mapping[str, Any]) -> dict[str, Any]:
    fd, recall = (number(line.get(f"quality/{name}")) for name in ("fd", "recall"))
    at, how = (whole(line.get("images_seen")), "training") if fd is not None else (None, None)
    return {"fd": fd, "fd_over_floor": None, "recall": recall, "measured": how, "measured_at": at}


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # a training has removed it
                continue
    return total
