"""report.html: one file, readable without knowing the code, opened from a mail or a bucket as well as from a disk.

Pictures are embedded, styles inline, nothing is loaded from anywhere. The page itself is `report.html.jinja`.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from pipeline.observe.pictures import png

DAMAGE = {"blur": "Blur", "noise": "Gaussian noise", "salt_pepper": "Salt and pepper", "rows": "Black rows"}


class Picture(NamedTuple):
    """A picture of the report and what it shows."""

    name: str  # of its file, without suffix
    title: str
    caption: str
    image: Image.Image


def number(value: float | None) -> str:
    """Three significant digits, hundreds and more as whole numbers; a dash for what was not measured."""
    if value is None:
        return "–"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) >= 1 else f"{value:.3f}"


def render(metrics: dict[str, Any], pictures: Sequence[Picture], *, config: dict[str, Any], title: str) -> str:
    """The page as HTML. `metrics` is the content of metrics.json, `config` the configuration of the run."""
    settings = json.dumps(config, indent=1, default=str)
    page = templates(autoescape=True).get_template("report.html.jinja")
    return page.render(metrics, pictures=pictures, config=config, settings=settings, title=title, damages=DAMAGE) + "\n"


def compared(fd: dict[str, Any], key: str) -> float:
    """The distance of once, twice or latents that compares with the floor: of as many samples."""
    ratio = fd.get(f"{key}_ratio")
    return float(fd[key] if ratio is None else ratio * fd["floor"])


def templates(*, autoescape: bool) -> Environment:
    """The templates of this folder, with the filters that they use."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        extensions=["jinja2.ext.do"],
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=not autoescape,  # Markdown, where empty lines count
    )
    environment.filters |= {"number": number, "count": "{:,}".format, "compared": compared}
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["base64"] = lambda image: base64.b64encode(png(image)).decode()
    return environment
