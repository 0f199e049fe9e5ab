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

from naign.evaluate.measures import Subject
from naign.observe.pictures import grid, png, rows

DAMAGE = {"blur": "blur", "noise": "Gaussian noise", "salt_pepper": "salt and pepper", "rows": "black rows"}
ASKED = 12  # samples of a class
CLASSES = 20  # of which samples are shown, at most


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
    if abs(value) < 1:
        return f"{value:.3f}"
    if abs(value) < 99.95:
        return f"{value:#.3g}"
    return f"{value:,.0f}"


def render(
    metrics: dict[str, Any],
    pictures: Sequence[Picture],
    *,
    config: dict[str, Any],
    title: str,
) -> str:
    """The page as HTML. `metrics` is the content of metrics.json, `config` the configuration of the run."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "count": "{:,}".format,
        "compared": compared,
        "percent": lambda share: f"{100 * share:.1f} %",
        "base64": lambda image: base64.b64encode(png(image)).decode(),
        "quoted": lambda text: json.dumps(text, ensure_ascii=False),
    }
    template = environment.get_template("report.html.jinja")
    return template.render(
        metrics,
        pictures=pictures,
        config=config,
        settings=json.dumps(config, indent=1, default=str),
        title=title,
        damages=DAMAGE,
    )


def compared(fd: dict[str, Any], key: str) -> float:
    """The distance of once, twice or latents that compares with the floor: of as many samples."""
    ratio = fd.get(f"{key}_ratio")
    if ratio is None:
        return float(fd[key])
    return float(ratio * fd["floor"])


def draw_pictures(subject: Subject) -> list[Picture]:
    """Pictures of images: samples, also by class, repairs of test images, and samples over their nearest training
    images. None of points.
    """
    if not subject.is_image:
        return []
    model = subject.model
    chosen = "f(z): the network applied once to z. The first that were drawn, not selected."
    drawn = [Picture("samples", "Samples", chosen, grid(subject.once[:96], columns=16))]
    if subject.noise is not None:
        caption = "f of noise: no prior is needed."
        drawn.append(Picture("samples_noise", "Samples of noise", caption, grid(subject.noise[:96], columns=16)))
    asked = []
    counts = getattr(model.prior, "class_counts", ())  # of the training images
    learned = [name for name, count in zip(model.labels, counts, strict=False) if count]
    for name in learned[:CLASSES]:
        asked.append((name, model.sample(ASKED, seed=subject.seed, label=name).cpu()))
    if asked:
        caption = "A row is a class, a column the same noise."
        drawn.append(Picture("classes", "Samples by class", caption, rows(asked)))
    blind = "Test images. f does not know how they were damaged. Last row: the nearest training image, an answer that "
    blind += "needs no network."
    for kind, answers in subject.repaired.items():
        lines = [
            ("clean", subject.test[: len(answers["input"])]),
            ("damaged", answers["input"]),
            ("f once", answers["once"]),
            ("f twice", answers["twice"]),
            ("nearest", answers["nearest"]),
        ]
        drawn.append(Picture(f"restoration_{kind}", f"Repair: {DAMAGE[kind]}", blind, rows(lines)))
    neighbours = subject.neighbours
    both = [
        ("f(z)", subject.once[: len(neighbours)]),
        ("training", neighbours),
    ]
    copied = "Alike in kind is good; the same image would be a copy."
    drawn.append(Picture("neighbours", "Samples over their nearest training image", copied, rows(both)))
    return drawn
