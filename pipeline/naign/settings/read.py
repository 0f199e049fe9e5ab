"""From a YAML file to the typed dataclasses of the settings, with an error for each key or value that does not fit."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from naign import shipped
from naign.errors import InputError, check_address, printable, require, shown

MOST = 2**62  # no setting has a use for larger numbers, which overflow
LISTS = ("report.trackers", "train.callbacks")  # settings that a file may also give as a list

RENAMED = {
    "prior.begin": "f is trained on train.images, and then the prior is fitted to the codes of prior.images",
    "prior.alone": "f is trained on train.images, and then the prior is fitted to the codes of prior.images",
    "prior.grid": "it is latents.grid",
    "objective.third_weight": "the third term has weight 1",
    "quality": "`naign evaluate` measures a checkpoint",
    "match.assignment": "each image is matched to its nearest sample",
    "train.beta1": "AdamW's moments decay by 0.9 and 0.99; another package can add an optimizer (CONTRIBUTING.md)",
    "train.beta2": "AdamW's moments decay by 0.9 and 0.99; another package can add an optimizer (CONTRIBUTING.md)",
}
"""Settings that recipes of earlier versions have, and what there is now instead."""

Named = Mapping[str, tuple[str, Callable[[str], tuple[Any, Any]]]]
"""Sections whose settings class depends on a name: the default name, and the lookup of a name's class."""


def read_yaml(path: str) -> Any:
    """The content of a YAML file, or of a name in configs/. Raises InputError, which never shows the content."""
    check_address(path)
    file = Path(path)
    named = shipped(f"configs/{path}.yaml")
    try:
        if file.name == path and not file.is_file() and named.is_file():
            file = named
        return yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in shipped("configs").glob("*.yaml")))
        raise InputError(f"no configuration file '{path}': give a file, or one of these names: {names}") from None
    except OSError as error:
        raise InputError(f"{path or '--config without a file'} cannot be read: {error.strerror}") from None
    except (ValueError, OverflowError, RecursionError, LookupError, AttributeError, yaml.YAMLError) as error:
        # Do not quote the error: it shows the content of the file, which may be a secret.
        where = ""
        mark = getattr(error, "problem_mark", None)
        if mark:
            where = f", line {mark.line + 1}, column {mark.column + 1}"
        raise InputError(f"{path}{where}: not valid YAML ({type(error).__name__}): see configs/mnist.yaml") from None


def build(kind: Any, content: Any, where: str, *, named: Named, prefix: str = "") -> Any:
    """A settings dataclass with the keys and values of `content`; fields that it does not name keep their defaults.

    Raises InputError, which names the file `where`, for an unknown key and for a value of another type.
    """
    section = prefix.rstrip(".")
    what = section or "the file"
    if not isinstance(content, dict):
        raise InputError(f"{where}: '{what}' must hold keys and values")
    require((all(isinstance(key, str) for key in content), f"{where}: a key of '{what}' is not text"))
    choice = None
    if section in named:
        default, find = named[section]
        content = {"name": default, **content}
        choice = convert(str, content["name"], f"{where}: {prefix}name")
        try:
            kind = find(choice)[0]
        except InputError as error:  # the name may be of a package that is not installed here
            raise InputError(f"{where}: {error}") from error
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in hints:
            _refuse_unknown(kind, name, where, choice)
        if dataclasses.is_dataclass(hints[key]):
            below = {} if value is None else value
            values[key] = build(hints[key], below, where, named=named, prefix=f"{name}.")
            continue
        if name in LISTS and isinstance(value, list):
            with suppress(ValueError):  # a number with too many digits, which `convert` refuses
                value = yaml.safe_dump(value, default_flow_style=True, width=MOST).strip()
        values[key] = convert(hints[key], value, f"{where}: {name}")
    return kind(**values)


def _refuse_unknown(
    kind: Any,
    name: str,
    where: str,
    choice: str | None,
) -> typing.NoReturn:
    if name in RENAMED:
        raise InputError(f"{where}: {name} is a setting of an earlier version: {RENAMED[name]}")
    section, _, key = name.rpartition(".")
    names = list(typing.get_type_hints(kind))
    if not re.fullmatch(r"[\w.]{1,40}", key):
        key = f"{printable(key, 8)}..."  # it may be a line of secrets
    if section:
        known = [f"{section}.{one}" for one in names]
        unknown = f"unknown key '{section}.{key}'"
    else:
        known = [one for one, _, _ in leaves(kind())] + names
        unknown = f"unknown key '{key}'"
    if choice:
        unknown += f" of {section}.name={choice}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if near:
        raise InputError(f"{where}: {unknown}; did you mean '{near[0]}'?")
    raise InputError(f"{where}: {unknown}; known settings: {', '.join(names)}")


def convert(target: Any, value: Any, where: str) -> Any:
    """Convert a value of YAML, which reads 1e-3 as text and 1 as an integer. A path, of a program, becomes text. All
    other types must match.
    """
    with suppress(TypeError, ValueError, OverflowError):
        if target is float and not isinstance(value, bool):
            return float(value)
        if target is int and isinstance(value, (float, str)) and float(value).is_integer():
            return int(float(value))
        if isinstance(value, target) and isinstance(value, bool) == (target is bool):
            return value
        if target is str and (type(value) is int or isinstance(value, Path)):
            return str(value)
    raise InputError(f"{where} is {shown(value)}: it must be {target.__name__}")


def leaves(settings: Any, prefix: str = "", change: str = "") -> Iterator[tuple[str, Any, str]]:
    """(section.key, value, whether a resumed run may change it) of every setting below a dataclass."""
    for one in dataclasses.fields(settings):
        key = prefix + one.name
        value = getattr(settings, one.name)
        may = one.metadata.get("change", change)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.", may)
        else:
            yield key, value, may
