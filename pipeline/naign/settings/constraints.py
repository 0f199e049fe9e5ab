"""Metadata of settings: which values a field of a dataclass takes, and whether a resumed run may change it.

    threads: int = field(default=0, metadata=FREE | AT_LEAST_0)

A field with neither FREE nor MAY_CHANGE determines what a run computes and may not change.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from naign.errors import InputError

Metadata = dict[str, Any]
# A resumed run may change it: results depend on it by rounding at most. On a section it holds for all its settings.
FREE: Metadata = {"change": "free"}
# A resumed run may change it with resume=changed, and is then no longer the same run.
MAY_CHANGE: Metadata = {"change": "asked"}


def _takes(holds: Callable[[Any], bool], must: str) -> Metadata:
    def checked(value: Any) -> bool:
        try:
            return holds(value)
        except TypeError:  # text where a number belongs, as in an edited file
            return False

    return {"holds": checked, "must": must}


POSITIVE = _takes(lambda value: value > 0, "it must be positive")
AT_LEAST_0 = _takes(lambda value: value >= 0, "it must be at least 0")
SHARE = _takes(lambda value: 0 <= value < 1, "it must lie in [0, 1)")
NOT_EMPTY = _takes(bool, "name a folder")


def between(least: float, most: float) -> Metadata:
    """Numbers from `least` to `most`."""
    return _takes(lambda value: least <= value <= most, f"it must lie between {least} and {most}")


def one_of(names: Collection[str]) -> Metadata:
    """One of these names."""
    return _takes(lambda value: value in names, f"choose one of {', '.join(name for name in names if name)}")


def check_fields(settings: Any, section: str) -> None:
    """Raise InputError if the value of a field, also of a nested dataclass, violates its metadata."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        key = f"{section}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            check_fields(value, key)
        elif field.type is int and isinstance(value, float):
            raise InputError(f"{key} is {value}: it must be a whole number")
        elif "holds" in field.metadata and not field.metadata["holds"](value):
            shown = value
            if isinstance(value, str):
                shown = f"'{value}'" if value else "empty"
            raise InputError(f"{key} is {shown}: {field.metadata['must']}")
