"""One row of pictures a run: samples, repairs of noise, repairs of blur.

    python benchmarks/pictures.py RUN [RUN ...] --colours 64 --to docs/samples.png

A run must have been evaluated: `naign evaluate RUN`, or any table that has it.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from pipeline.cli.files import save
from pipeline.errors import InputError, exit_on_input_error

PICTURES = ("samples", "restoration_noise", "restoration_blur")
"""Of a row, from left to right."""
GAP = 12
"""Pixels between pictures."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Put runs' pictures together."""

    runs: tyro.conf.Positional[list[Path]]
    """Evaluated runs, from top to bottom."""
    to: Path
    """The PNG to write."""
    colours: int = 0
    """Size of the palette, at most 256, for a smaller file of grey pictures. 0: all colours."""


def strip(run: Path) -> list[Image.Image]:
    """A run's pictures; InputError if it has not been evaluated."""
    try:
        return [Image.open(run / f"evaluation/{name}.png").convert("RGBA") for name in PICTURES]
    except OSError as error:
        raise InputError(f"{run} has no pictures: naign evaluate {run} ({error})") from None


def main(settings: Settings) -> None:
    if not settings.runs or settings.to.suffix != ".png" or settings.to.is_dir():
        raise InputError(f"give runs, and --to {settings.to} as the name of a .png file")
    if not 0 <= settings.colours <= 256:
        raise InputError(f"--colours is {settings.colours}: it must lie between 0 and 256")
    strips = [strip(run) for run in settings.runs]
    width = max(sum(image.width + GAP for image in images) for images in strips)
    heights = [max(image.height for image in images) + GAP for images in strips]
    canvas = Image.new("RGBA", (width, sum(heights)), (0, 0, 0, 0))
    for line, images in enumerate(strips):
        left = 0
        for image in images:
            canvas.paste(image, (left, sum(heights[:line])))
            left += image.width + GAP
    try:
        settings.to.parent.mkdir(parents=True, exist_ok=True)
        save(canvas.quantize(settings.colours) if settings.colours else canvas, settings.to)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None


if __name__ == "__main__":
    with exit_on_input_error("pictures"):
        main(tyro.cli(Settings))
