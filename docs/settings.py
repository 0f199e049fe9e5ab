"""Writes docs/settings.md, the reference of every setting, from the dataclasses: python docs/settings.py."""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from naign.config import Config
from naign.model.losses import OBJECTIVES
from naign.model.networks import NETWORKS
from naign.model.prior import PRIORS
from naign.model.prior.noise import LATENTS

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
# Settings

Every setting of a training, with its default. `python docs/settings.py` generates this page from the dataclasses.

Give a setting on the command line as `--train.lr=1e-3`, or in a YAML file that `--config` names:

```yaml
train:
  lr: 1e-3
```

The last column says whether a resumed run may change the setting: *yes*; *if asked*, with `--resume=changed`; or *no*.
"""
CHANGE = {"": "no", "free": "yes", "asked": "if asked"}
NAMED = {"model": NETWORKS, "objective": OBJECTIVES, "latents": LATENTS, "prior": PRIORS}
"""Sections whose settings depend on the chosen name."""


def docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass and of its bases."""
    found = {}
    for one in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
        for statement, after in pairwise(body):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def values(hint: type, metadata: typing.Mapping[str, Any]) -> str:
    """The type of a setting, and what its value has to satisfy."""
    must = re.sub(r"^(it must (be |lie )?|a weight is |choose )", "", metadata.get("must", ""))
    must = must.replace("name a folder", "not empty")
    if must:
        return f"{hint.__name__}, {must}"
    return hint.__name__


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def cells(kind: type, prefix: str, change: str, names: Collection[str]) -> Iterator[list[str]]:
    """The cells of a row for each of these settings of a dataclass; sections within it are tables of their own."""
    hints = typing.get_type_hints(kind)
    texts = docstrings(kind)
    for field in dataclasses.fields(kind):
        if field.name not in names or dataclasses.is_dataclass(hints[field.name]):
            continue
        yield [
            f"`{prefix}{field.name}`",
            values(hints[field.name], field.metadata),
            f"`{field.default}`" if field.default != "" else "empty",
            re.sub(r"([|*<])", r"\\\1", texts[field.name]),
            CHANGE[field.metadata.get("change", change)],
        ]


def of_choices(choices: typing.Mapping[str, Any], prefix: str, change: str, shared: set[str]) -> Iterator[list[str]]:
    """The cells of a row for each setting that only some choices of a name have: what differs is said by choice."""
    rows: dict[str, dict[str, list[str]]] = {}  # by setting, then by choice
    for choice, entry in choices.items():
        for row in cells(entry[0], prefix, change, fields(entry[0]) - shared):
            rows.setdefault(row[0], {})[choice] = row
    for row in rows.values():
        merged = []
        for column in zip(*row.values(), strict=True):
            if len(set(column)) > 1:
                merged.append("; ".join(f"{name}: {cell.rstrip('.')}" for name, cell in zip(row, column, strict=True)))
            else:
                merged.append(column[0])
        yield [merged[0], ", ".join(row), *merged[1:]]


def table(rows: Iterable[list[str]], *chosen: str) -> Iterator[str]:
    columns = ["setting", *chosen, "values", "default", "meaning", "may change"]
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def page() -> str:
    lines = [HEAD, "## Without a section", "", *table(cells(Config, "", "", fields(Config)))]
    pending = [(field.name, field) for field in dataclasses.fields(Config)]
    while pending:
        name, field = pending.pop(0)
        if not dataclasses.is_dataclass(field.default_factory):
            continue
        change = field.metadata.get("change", "")
        kind = typing.cast(type, field.default_factory)
        shared = fields(kind)
        if name in NAMED:
            shared = fields(typing.get_type_hints(Config)[name])
        lines += ["", f"## {name}", "", *table(cells(kind, f"{name}.", change, shared))]
        rows = list(of_choices(NAMED.get(name, {}), f"{name}.", change, shared))
        if rows:
            lines += ["", f"## {name}, by {name}.name", "", *table(rows, f"{name}.name")]
        if name not in NAMED:
            pending = [(f"{name}.{inner.name}", inner) for inner in dataclasses.fields(kind)] + pending
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
