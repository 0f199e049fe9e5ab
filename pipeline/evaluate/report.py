"""report.html: one file, readable without knowing the code, opened from a mail or a bucket as well as from a disk.

Pictures are embedded, styles inline, nothing is loaded from anywhere. Words first, then pictures, then tables.
"""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline.observe.pictures import png

STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--paper:#fff;--soft:#f3f4f6;--line:#d8dbe0;--mute:#626870;--bar:#2d6cdf}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--paper:#141619;--soft:#1e2126;--line:#353a42;--mute:#9aa1ab;
--bar:#6b9cf5}}
body{margin:0 auto;max-width:60rem;padding:2rem 1.2rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.6rem 0 .4rem}p{margin:.5rem 0}
.mute,figcaption{color:var(--mute);font-size:.92rem}
ul.main{padding:0;list-style:none;display:grid;gap:.7rem;margin:1.4rem 0}
ul.main li{background:var(--soft);border-radius:8px;padding:.7rem 1rem}
figure{margin:1rem 0 1.8rem}img{max-width:100%;height:auto}
table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
th,td{padding:.28rem .8rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:var(--mute)}
.bar{display:inline-block;height:.8em;background:var(--bar);border-radius:2px}
pre{background:var(--soft);padding:1rem;border-radius:8px;overflow-x:auto;font-size:.85rem}
"""

DAMAGE = {
    "blur": "Blur",
    "noise": "Gaussian noise",
    "salt_pepper": "Salt and pepper",
    "rows": "Black rows",
}
ANSWER = {
    "input": "damaged input",
    "once": "f once",
    "twice": "f twice",
    "black": "all black",
    "median": "median image",
    "nearest": "nearest training image",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the report and what it shows."""

    name: str
    """File name without suffix."""
    title: str
    caption: str
    image: Image.Image

    def png(self) -> bytes:
        """The picture as a PNG file."""
        return png(self.image)


def number(value: float | None) -> str:
    """Three significant digits, hundreds and more as whole numbers; a dash for what was not measured."""
    if value is None:
        return "–"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) >= 1 else f"{value:.3f}"


def percent(value: float) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * value:.1f} %"


def _taught(config: dict[str, Any]) -> str:
    """What training showed it of damage, for the sentence on repair."""
    objective = config.get("objective")
    if not objective or not objective.get("denoising"):
        return ", and never saw damage in training" if objective else ""
    kinds = {"mixed": "mixed damage, kin to this", "noise": "Gaussian noise alone"}
    return f"; in training it saw {kinds.get(str(objective.get('damage')), 'damage')}"


def headline(metrics: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The main results as sentences of HTML, each with what it means."""
    fd, move, near = metrics["fd"], metrics["idempotence"], metrics["nearest"]
    lines = [
        f"<b>The samples' distance to real data is {number(fd['once_ratio'])} times the floor.</b> Fréchet "
        f"distance on <i>{html.escape(metrics['encoder'])}</i>: {number(fd['once'])} for f(z), {number(fd['twice'])} "
        f"for f(f(z)). The floor, {number(fd['floor'])}, is what real training data score; no generator needs less."
    ]
    if metrics["modes"] is not None:
        least = min(range(len(metrics["modes"])), key=metrics["modes"].__getitem__)
        lines.append(
            f"<b>{sum(share > 0.001 for share in metrics['modes'])} of {len(metrics['modes'])} classes appear among "
            f"the samples.</b> The rarest, {html.escape(metrics['classes'][least])}, makes up "
            f"{percent(metrics['modes'][least])}; even shares would be {percent(1 / len(metrics['modes']))}."
        )
    if metrics["restoration"] is not None:
        repairs = "; ".join(
            f"{DAMAGE[kind].lower()} {number(table['input'])} → {number(table['once'])}"
            for kind, table in metrics["restoration"].items()
        )
        lines.append(
            f"<b>Repair of test images</b>, mean absolute error before → after one application, in a scale of −1 to "
            f"1: {repairs}. f is not told what was done to an image{html.escape(_taught(config))}."
        )
    lines.append(
        f"<b>Applying f again moves a sample by {number(move['samples'])}</b>"
        + (f" and a repaired image by {number(move['damaged'])}" if move["damaged"] is not None else "")
        + f" on average per value. A perfect projection would move nothing. Real test data it changes by "
        f"{number(metrics['reconstruction'])}."
    )
    if near["ratio"] is None:
        lines.append("<b>Every test example is a training example too</b>, so copying cannot be judged.")
    else:
        copies = "Well below 1: look for copies of training data." if near["ratio"] < 0.7 else "No sign of copying."
        lines.append(
            f"<b>Samples are {number(near['ratio'])} times as far from their nearest training example as unseen test "
            f"data are.</b> {copies}"
        )
    return lines


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def best_bold(values: Sequence[float | None], *, largest: bool) -> list[str]:
    """Numbers as HTML, the best in bold."""
    known = [value for value in values if value is not None]
    best = (max(known) if largest else min(known)) if known else None
    return [f"<b>{number(value)}</b>" if value == best and best is not None else number(value) for value in values]


def restoration_section(metrics: dict[str, Any]) -> str:
    """The three tables of restoration: one damage a line, one answer a column."""
    parts = ["<h2>Repair</h2>"]
    for key, title, largest, count in (
        (None, "Mean absolute error, lower is better", False, "restoration"),
        ("psnr", "Peak signal-to-noise ratio in dB, higher is better", True, "similarity"),
        ("ssim", "Structural similarity, higher is better", True, "similarity"),
    ):
        lines = []
        for kind, errors in metrics["restoration"].items():
            source = errors if key is None else errors[key]
            lines.append([DAMAGE[kind], *best_bold([source[name] for name in ANSWER], largest=largest)])
        parts.append(f"<p>{title} ({metrics['counts'][count]:,} test images).</p>")
        parts.append(table(["damage", *ANSWER.values()], lines))
    parts.append(
        "<p class='mute'>Four answers need no learning: leaving the damage, all black, the per-pixel median of "
        f"{metrics['counts']['median']:,} training images, and the nearest of "
        f"{metrics['counts']['restoration_reference']:,}.</p>"
    )
    return "".join(parts)


def distance_section(metrics: dict[str, Any]) -> str:
    fd, counts, accuracy = metrics["fd"], metrics["counts"], metrics["encoder_accuracy"]
    lines = [
        [label, number(fd[key]), number(fd[key] / fd["floor"]) if fd["floor"] else "–"]
        for key, label in (("floor", "training data (the floor)"), ("once", "f(z)"), ("twice", "f(f(z))"))
    ]
    return (
        f"<h2>Distance to the real data</h2><p>Fréchet distance to {counts['test']:,} test examples, on "
        f"{html.escape(metrics['encoder'])}"
        + (f", a classifier that is right on {percent(accuracy)} of real test images" if accuracy else "")
        + f". Samples: {counts['samples']:,}; floor: {counts['floor']:,} training examples.</p>"
        + table(["compared with test data", "distance", "× floor"], lines)
    )


def coverage_section(metrics: dict[str, Any]) -> str:
    cover = metrics["coverage"]
    meaning = {
        "precision": "share of samples that look like real data",
        "recall": "share of real data that the samples could be",
        "density": "precision that outliers cannot inflate; 1 is ideal",
        "coverage": "share of real data with a sample in its neighbourhood",
    }
    return (
        f"<h2>Coverage</h2><p>{metrics['counts']['coverage']:,} samples against as many test examples, k = 5. "
        f"Read the four together: features of pure noise can crowd into one wide ball of a real image, which "
        f"counts as precision, but then recall and coverage are near zero.</p>"
        + table(
            ["", "samples", "training data", "meaning"],
            [[name, number(cover[name]), number(cover["train"][name]), text] for name, text in meaning.items()],
        )
    )


def classes_section(metrics: dict[str, Any]) -> str:
    top = max(metrics["modes"])
    lines = [
        [html.escape(name), percent(share), f'<span class="bar" style="width:{12 * share / top:.2f}rem"></span>']
        for name, share in zip(metrics["classes"], metrics["modes"], strict=True)
    ]
    return "<h2>Classes among the samples</h2>" + table(["class", "share", ""], lines)


def fixed_point_sections(metrics: dict[str, Any]) -> str:
    """Copying, and idempotence."""
    near, counts, move = metrics["nearest"], metrics["counts"], metrics["idempotence"]
    lines = [
        ["f(f(z)) − f(z): samples", number(move["samples"])],
        ["f(f(y)) − f(y): damaged test images", number(move["damaged"])],
        ["f(x) − x: test data (reconstruction)", number(metrics["reconstruction"])],
    ]
    return (
        f"<h2>Copying</h2><p>Mean distance to the nearest of {counts['nearest_reference']:,} training examples: "
        f"{number(near['samples'])} for {counts['nearest']:,} samples, {number(near['test'])} for as many test "
        f"examples.</p><h2>Idempotence</h2>" + table(["mean change per value", ""], lines)
    )


def density_section(metrics: dict[str, Any]) -> str:
    energy, brightness = metrics["density"]["energy"], metrics["density"]["brightness"]
    lines = [[name, number(value), number(brightness[name])] for name, value in energy.items()]
    return (
        f"<h2>Energy as a test for what is not data</h2><p>E(x) = mean (f(x) − x)². AUROC of telling "
        f"{metrics['counts']['density']:,} test images from: (1 perfect, 0.5 a coin, near 0 taken for better than "
        f"real). Brightness alone is the baseline.</p>" + table(["outlier", "energy", "brightness"], lines)
    )


def sections(metrics: dict[str, Any]) -> list[str]:
    """The tables as HTML, those that were measured."""
    every = {
        restoration_section: metrics["restoration"],
        distance_section: metrics["fd"],
        coverage_section: metrics["coverage"],
        classes_section: metrics["modes"],
        fixed_point_sections: metrics["nearest"],
        density_section: metrics["density"],
    }
    return [section(metrics) for section, measured in every.items() if measured is not None]


def render(metrics: dict[str, Any], pictures: Sequence[Picture], *, config: dict[str, Any], title: str) -> str:
    """The whole page as HTML. `metrics` is what metrics.json holds; `config` the run's own configuration."""
    figures = "".join(
        f'<h2>{html.escape(picture.title)}</h2><figure><img alt="{html.escape(picture.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.png()).decode()}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )
    seen = metrics["images_seen"]
    words = "".join(f"<li>{line}</li>" for line in headline(metrics, config))
    settings = html.escape(json.dumps(config, indent=1, default=str))
    notes = "".join(f"<p class='mute'>{html.escape(note)}</p>" for note in metrics["notes"])
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><body><h1>{html.escape(title)}</h1>"
        f"<p class='mute'>One network f that generates, f(noise), and repairs, f(damaged). Data: "
        f"{html.escape(metrics['dataset'])}, test split. "
        f"{'Trained on ' + format(seen, ',') + ' images. ' if seen is not None else ''}"
        f"Measured in {metrics['seconds']:.0f} s on {html.escape(metrics['device'])}, "
        f"seed {metrics['evaluation_seed']}.</p><ul class='main'>{words}</ul>{notes}"
        f"{figures}{''.join(sections(metrics))}"
        f"<h2>Configuration</h2><pre>{settings}</pre></body></html>\n"
    )
