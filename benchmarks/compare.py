"""Runs side by side: one table of what `naign evaluate` measured of each, and the same as JSON.

    python benchmarks/compare.py runs/mnist runs/mnist_ign --to benchmarks/results/mnist

writes mnist.md, mnist.json and mnist.png (each run's first samples and repairs, one above the other).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from trained import KINDS, table

from pipeline.errors import InputError, exit_on_input_error


def rows(metrics: dict[str, Any]) -> dict[str, str]:
    """Cells by row title."""
    fd = metrics["fd"]
    cells = {
        "training, images seen": f"{metrics['images_seen']:,}",
        "training, seconds": f"{metrics['training_seconds']:.0f}",
        f"Fréchet distance on {metrics['encoder']}, f(z)": f"{fd['once']:.1f} ({fd['once'] / fd['floor']:.1f} x floor)",
        "… f(f(z))": f"{fd['twice']:.1f} ({fd['twice'] / fd['floor']:.1f} x floor)",
        "… floor, training against test images": f"{fd['floor']:.2f}",
        "rarest class among samples": f"{100 * min(metrics['modes']):.1f} %",
    }
    cells |= {name: f"{metrics['coverage'][name]:.2f}" for name in ("precision", "recall", "density", "coverage")}
    for kind in KINDS:
        table = metrics["restoration"][kind]
        cells[f"restoration MAE, {kind.replace('_', ' ')} (input {table['input']:.3f})"] = f"{table['once']:.3f}"
    cells["idempotence on samples, mean of abs(f(f(z)) − f(z))"] = f"{metrics['idempotence']['samples']:.3f}"
    cells["reconstruction MAE"] = f"{metrics['reconstruction']:.3f}"
    return cells


def read(run: Path) -> dict[str, Any]:
    """A run's evaluation."""
    try:
        metrics: dict[str, Any] = json.loads((run / "evaluation/metrics.json").read_text())
    except OSError as error:
        raise InputError(f"{run} has not been evaluated: naign evaluate {run} ({error})") from None
    return metrics


def picture(runs: list[Path]) -> Image.Image:
    """Each run's samples beside its repair of noise and of blur."""
    names = ("samples", "restoration_noise", "restoration_blur")
    strips = [[Image.open(run / f"evaluation/{name}.png").convert("RGBA") for name in names] for run in runs]
    gap = 12
    width = max(sum(image.width + gap for image in strip) for strip in strips)
    heights = [max(image.height for image in strip) + gap for strip in strips]
    canvas = Image.new("RGBA", (width, sum(heights)), (0, 0, 0, 0))
    for line, strip in enumerate(strips):
        left = 0
        for image in strip:
            canvas.paste(image, (left, sum(heights[:line])))
            left += image.width + gap
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="evaluated runs")
    parser.add_argument("--to", type=Path, help="where to write, without an ending; default: print only")
    arguments = parser.parse_args()
    with exit_on_input_error("compare"):
        found = [read(run) for run in arguments.runs]
        columns = [rows(metrics) for metrics in found]
        names = [run.name for run in arguments.runs]
        lines = [
            [title, *(list(column.values())[index] for column in columns)] for index, title in enumerate(columns[0])
        ]
        text = f"`python {' '.join(['benchmarks/compare.py', *sys.argv[1:]])}`\n\n" + table(["", *names], lines) + "\n"
        print(text)
        if arguments.to:
            arguments.to.parent.mkdir(parents=True, exist_ok=True)
            arguments.to.with_suffix(".md").write_text(text)
            results = dict(zip(names, found, strict=True))
            arguments.to.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            picture(arguments.runs).save(arguments.to.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
