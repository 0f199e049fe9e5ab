"""Samples and repairs of runs, as one picture: docs/pictures.png, docs/samples.png and docs/nearest.png.

    python benchmarks/pictures.py RUN [RUN ...] --colours 64 --to docs/pictures.png
    python benchmarks/pictures.py runs/mnist runs/fashion_mnist runs/cifar10_cpu \\
        --front --colours 256 --to docs/samples.png
    python benchmarks/pictures.py runs/fashion_mnist runs/cifar10_cpu --nearest --colours 256 --to docs/nearest.png

A run must have been evaluated: `naign evaluate RUN`, or any table that has it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from naign import nearest
from naign.cli.files import save
from naign.data.damage import KINDS
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.recorded import recorded
from naign.model.naign import NAIGN
from naign.observe.pictures import GAP as INNER
from naign.observe.pictures import TEXT, grid, to_image

PICTURES = ("samples", "restoration_noise", "restoration_blur")
"""Of a row, from left to right."""
GAP = 12
"""Pixels between pictures."""
CELL = 68
"""With --front, pixels of an image."""
MARGIN = 150
"""Left of the columns, for names."""
ROW = 72
"""From row to row."""
FONT = 28
"""Height of letters."""
CLEAR = (0, 0, 0, 0)
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
NAMES = {0: "samples", 3: "damaged", 4: "repaired", 5: "drawn", 6: "scraps", 7: "noise"}
"""Of rows."""
DRAWINGS = (
    [
        [(8, 9), (13, 5), (18, 9), (15, 14)],
        [(13, 17), (8, 22)],
        [(10, 23), (20, 22)],
    ],
    [
        [(17, 7), (12, 6), (10, 10), (14, 13), (17, 9)],
        [(18, 12), (17, 17)],
        [(16, 20), (14, 24)],
    ],
)
"""Strokes on 28 x 28 pixels, which do not meet: of a 2 and of a 9."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Put runs' pictures together."""

    runs: tyro.conf.Positional[list[Path]]
    """Evaluated runs, from top to bottom."""
    to: Path
    """The PNG to write."""
    front: bool = False
    """A column a run instead of a row, with the first 12 samples and four repairs; and what the first run's model makes
    of drawings and of white noise."""
    nearest: bool = False
    """Of each run the first 100 samples, and beside them the nearest training image of each, which is a mirrored one
    where f was trained on those."""
    colours: int = 0
    """Size of the palette, at most 256, for a smaller file. 0: all colours."""


def load(run: Path, name: str) -> Image.Image:
    """A picture of a run's report. Raises InputError if it has not been evaluated."""
    try:
        return Image.open(run / f"evaluation/{name}.png").convert("RGBA")
    except OSError as error:
        raise InputError(f"{run} has no pictures: naign evaluate {run} ({error})") from None


def side_by_side(runs: list[Path]) -> Image.Image:
    """A row a run: the pictures of its report as they are."""
    lines = []
    for run in runs:
        lines.append([load(run, name) for name in PICTURES])
    return stacked(lines)


def stacked(lines: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures as one picture."""
    placed = []
    width = 0
    top = 0
    for images in lines:
        left = 0
        for image in images:
            placed.append((image, left, top))
            left += image.width + GAP
        width = max(width, left)
        top += max(image.height for image in images) + GAP
    canvas = Image.new("RGBA", (width, top), CLEAR)
    for image, left, at in placed:
        canvas.paste(image, (left, at))
    return canvas


def cut(
    picture: Image.Image,
    rows: int,
    row: int,
    from_right: int,
) -> Image.Image:
    """One image of a grid, counted from its right end, since names may stand at the left."""
    side = (picture.height + INNER) // rows
    left = picture.width + INNER - from_right * side
    top = row * side
    right = left + side - INNER
    bottom = top + side - INNER
    return picture.crop((left, top, right, bottom))


def column_of(run: Path) -> list[list[Image.Image]]:
    """Rows of four: samples, the first that were drawn; test images damaged in four ways; and f of these."""
    samples = load(run, "samples")
    repairs = [load(run, f"restoration_{kind}") for kind in KINDS]
    lines = []
    for row in range(3):
        last = 16 - 4 * row
        lines.append([cut(samples, 6, 0, last - column) for column in range(4)])
    for row in (1, 2):
        images = []
        for column, picture in enumerate(repairs):
            images.append(cut(picture, 5, row, 10 - column))
        lines.append(images)
    return lines


def brought(run: Path) -> list[list[Image.Image]]:
    """Rows of DRAWINGS, of scraps and of noise, normal and uniform, each image followed by f of it by the run's model.

    A scrap is the middle half of a test image, with normal noise above and below it.
    """
    model = NAIGN.from_pretrained(run)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, *model.shape, generator=generator)
    uniform = 2 * torch.rand(1, *model.shape, generator=generator) - 1
    whole = load(run, f"restoration_{KINDS[0]}")
    scraps = []
    for column in (10, 9):
        scrap = normal.clone()
        scrap[:, :, 5:19] = pixels_of(cut(whole, 5, 0, column))[:, :, 5:19]
        scraps.append(scrap)
    lines = []
    for given in (drawings(), scraps, [normal, uniform]):
        images = []
        for x in given:
            images += [to_image(x[0]), to_image(model.project(x)[0])]
        lines.append(images)
    return lines


def drawings() -> list[Tensor]:
    """Each of DRAWINGS, (1, 1, 28, 28)."""
    found = []
    for strokes in DRAWINGS:
        canvas = Image.new("L", (28 * 8, 28 * 8))
        for stroke in strokes:
            line = [(8 * x, 8 * y) for x, y in stroke]
            ImageDraw.Draw(canvas).line(line, fill=255, width=14, joint="curve")
        found.append(pixels_of(canvas))
    return found


def pixels_of(picture: Image.Image) -> Tensor:
    """(1, 1, 28, 28) in [-1, 1]."""
    small = picture.convert("L").resize((28, 28), Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return scaled(pixels.view(1, 1, 28, 28))


def front(runs: list[Path]) -> Image.Image:
    """A column a run, with names that stay legible when the picture is 360 pixels wide."""
    width = 4 * ROW + 20
    size = (MARGIN + len(runs) * width - 24, 40 + 8 * ROW + 44)
    canvas = Image.new("RGBA", size, CLEAR)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT)
    tops = []
    for row in range(8):
        gaps = (row > 2) + (row > 4)
        tops.append(44 + ROW * row + 12 * gaps)
    for row, name in NAMES.items():
        middle = tops[row] + CELL // 2
        draw.text((0, middle), name, fill=TEXT, font=font, anchor="lm")
    for number, run in enumerate(runs):
        left = MARGIN + number * width
        draw.text((left, 4), title_of(run), fill=TEXT, font=font)
        lines = column_of(run)
        if number == 0:
            lines += brought(run)
        for row, images in enumerate(lines):
            for column, image in enumerate(images):
                shown = image.resize((CELL, CELL), Image.Resampling.BICUBIC)
                canvas.paste(shown, (left + column * ROW, tops[row]))
    return canvas


def beside_training(runs: list[Path]) -> Image.Image:
    """A row a run: the grid of its first samples, and that of the nearest training image of each."""
    lines = []
    for run in runs:
        model = NAIGN.from_pretrained(run)
        data, _ = recorded(model, str(run), None)
        images, _ = read_split(data, "train")
        training = scaled(images)
        if data.flip:
            training = torch.cat([training, training.flip(-1)])
        samples = model.sample(100, seed=0)
        _, ids = nearest(samples.flatten(1), training.flatten(1), 0)
        lines.append([grid(samples, columns=10), grid(training[ids], columns=10)])
    return stacked(lines)


def title_of(run: Path) -> str:
    for part, title in TITLES.items():
        if run.name.startswith(part):
            return title
    return run.name


def main(settings: Settings) -> None:
    if not settings.runs or settings.to.suffix != ".png" or settings.to.is_dir():
        raise InputError(f"give runs, and --to {settings.to} as the name of a .png file")
    if not 0 <= settings.colours <= 256:
        raise InputError(f"--colours is {settings.colours}: it must lie between 0 and 256")
    draw = side_by_side
    if settings.front:
        draw = front
    elif settings.nearest:
        draw = beside_training
    canvas = draw(settings.runs)
    if settings.colours:
        canvas = canvas.quantize(settings.colours)
    try:
        settings.to.parent.mkdir(parents=True, exist_ok=True)
        save(canvas, settings.to)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None


if __name__ == "__main__":
    with exit_on_input_error("pictures"):
        main(tyro.cli(Settings))
