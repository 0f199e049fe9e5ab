"""Writes docs/settings.md, the reference of every setting, from the dataclasses: python docs/settings.py."""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Collection, Iterator
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


def table(
    kind: type,
    prefix: str,
    change: str,
    names: Collection[str],
) -> Iterator[str]:
    """A row for each of these settings of a dataclass; sections within it are tables of their own."""
    hints = typing.get_type_hints(kind)
    texts = docstrings(kind)
    yield "| setting | values | default | meaning | may change |"
    yield "| --- | --- | --- | --- | --- |"
    for field in dataclasses.fields(kind):
        if field.name not in names or dataclasses.is_dataclass(hints[field.name]):
            continue
        cells = [
            f"`{prefix}{field.name}`",
            values(hints[field.name], field.metadata),
            f"`{field.default}`" if field.default != "" else "empty",
            re.sub(r"([|*<])", r"\\\1", texts[field.name]),
            CHANGE[field.metadata.get("change", change)],
        ]
        yield f"| {' | '.join(cells)} |"


def page() -> str:
    lines = [HEAD, "## Without a section", "", *table(Config, "", "", fields(Config))]
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
        lines += ["", f"## {name}", "", *table(kind, f"{name}.", change, shared)]
        for choice, entry in NAMED.get(name, {}).items():
            more = fields(entry[0]) - shared
            if more:
                rows = table(entry[0], f"{name}.", change, more)
                lines += ["", f"## {name}, with {name}.name={choice}", "", *rows]
        if name not in NAMED:
            pending = [(f"{name}.{inner.name}", inner) for inner in dataclasses.fields(kind)] + pending
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
