"""Choices by name: built-in ones, and entry points of other installed packages, of the same form (CONTRIBUTING.md)."""

import difflib
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from naign.errors import InputError, printable

Entry = TypeVar("Entry")


def lookup(setting: str, name: str, builtin: Mapping[str, Entry], group: str) -> Entry:
    """The entry of that name. Entry points of the group are looked up only for a name that is not built in.

    Messages name the `setting`, as objective.name. Raises InputError for an unknown name, and for a package that fails
    to import or registers something else.
    """
    if name in builtin:
        return builtin[name]
    point = _entry_points(group).get(name)
    if point is None:
        there = known(builtin, group)
        choice = f"choose one of {', '.join(there)}" if there else "none is built in"
        unknown = f"{setting} is '{printable(name)}': {choice}, or install a package with entry points of {group}"
        unknown += " (baselines: pip install -e benchmarks/baselines)"
        near = difflib.get_close_matches(name, there, n=1)
        if near:
            unknown += f"; did you mean {near[0]}?"
        raise InputError(unknown)
    package = point.dist.name if point.dist else point.module
    named = f"{setting} is '{name}', which the package {package} brings as {point.value}, but"
    try:
        entry: Entry = point.load()
    except (Exception, SystemExit) as error:  # whatever another package's import may raise
        raise InputError(f"{named} importing that failed: {type(error).__name__}: {error}") from error
    example: object = next(iter(builtin.values()), lookup)  # a function, where nothing is built in
    if not _alike(entry, example):
        wanted = "a settings class and a function" if isinstance(example, tuple) else "a function"
        raise InputError(f"{named} that is a {type(entry).__name__}, not {wanted}, as {group} needs: fix the package")
    return entry


def _alike(entry: object, example: object) -> bool:
    """Whether both are of the same form: a settings class, a function, or a tuple of these."""
    if isinstance(example, tuple):
        return isinstance(entry, tuple) and len(entry) == len(example) and all(map(_alike, entry, example))
    if entry is example is None:
        return True
    if is_dataclass(example):
        return is_dataclass(entry) and callable(entry)
    return callable(entry)


def listed(names: str) -> list[str]:
    """The names of a setting that holds more than one: with commas between them, also as a list in YAML."""
    parts = [part.strip(" '\"") for part in names.strip(" []").split(",")]
    return [part for part in parts if part]


def known(builtin: Mapping[str, object], group: str) -> list[str]:
    """All names that `lookup` finds, the built-in ones first."""
    return [*builtin, *sorted(_entry_points(group).keys() - builtin.keys())]


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
