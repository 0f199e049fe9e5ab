"""Grids of images and drawings of 2-D point sets, as PIL images. No plotting library."""

import io
import unicodedata
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

CELL, GAP = 48, 3  # pixels: smallest side of an image in a grid, to which smaller ones are enlarged; and between images
PANEL = 320  # pixels: side of a panel of points
SIZE = 14  # pixels: of text
TEXT = (118, 118, 118, 255)  # contrast of 4.5 on white and on black
BLUE, ORANGE = (45, 108, 223), (224, 122, 31)


def to_image(image: Tensor, *, least: int = 1) -> Image.Image:
    """(C, H, W) in [-1, 1] -> RGB image with sides of at least `least` pixels. Of C other than 3 the first is shown."""
    channels, height, width = image.shape
    pixels = eight_bits(image)
    pixels = pixels if channels == 3 else pixels[:1].expand(3, height, width)
    factor = max(1, -(-least // min(height, width)))
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def eight_bits(image: Tensor) -> Tensor:
    """Values in [-1, 1], to which they are clipped, as uint8."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def grid(images: Tensor, *, columns: int) -> Image.Image:
    """(n, C, H, W) in [-1, 1] -> one image, filled row by row."""
    return rows([("", images[start : start + columns]) for start in range(0, len(images), columns)])


def rows(labelled: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Rows of (label, images (n, C, H, W)) -> one image with the labels, if any, at the left."""
    labels = [legible(label) for label, _ in labelled]
    margin = max((int(font.getlength(text)) + 12 for text, font in labels if text), default=0)
    cells = [[to_image(image, least=CELL) for image in images] for _, images in labelled]
    width, height = cells[0][0].size
    size = (margin + max(map(len, cells)) * (width + GAP) - GAP, len(cells) * (height + GAP) - GAP)
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for line, ((text, font), pictures) in enumerate(zip(labels, cells, strict=True)):
        top = line * (height + GAP)
        if text:
            draw.text((0, top + height // 2), text, fill=TEXT, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (margin + column * (width + GAP), top))
    return canvas


def scatter(panels: Sequence[tuple[str, Tensor]], *, behind: Tensor) -> Image.Image:
    """Panels (title, points (n, d)), the first two coordinates in orange, over `behind` (m, d) in blue, the scale."""
    low, high = behind[:, :2].min(0).values, behind[:, :2].max(0).values
    centre, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6) * 1.25  # of a square, with a margin
    canvas = Image.new("RGBA", (len(panels) * (PANEL + GAP) - GAP, PANEL + 22), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (title, points) in enumerate(panels):
        left = number * (PANEL + GAP)
        panel = Image.new("RGBA", (PANEL, PANEL), (127, 127, 127, 24))
        for cloud, colour in ((behind, BLUE), (points, ORANGE)):
            dots = ((cloud[:, :2] - centre) / half).clamp(-1, 1) * torch.tensor([1.0, -1.0])
            pen = ImageDraw.Draw(panel)
            for x, y in ((dots + 1) / 2 * (PANEL - 3)).round().int().tolist():
                pen.rectangle((x, y, x + 1, y + 1), fill=(*colour, 255))
        canvas.paste(panel, (left, 22))
        text, font = legible(title)
        draw.text((left, 3), text, fill=TEXT, font=font)
    return canvas


def legible(text: str) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """What can be drawn of a text, and the font for it: Pillow's own, which has little but ASCII, else DejaVu Sans, if
    the system has it. What the font lacks loses its accent, or becomes a question mark.
    """
    font = ImageFont.load_default(SIZE)
    if text.isascii():
        return text, font
    with suppress(OSError):
        font = ImageFont.truetype("DejaVuSans.ttf", SIZE)
    missing = bytes(font.getmask("\uffff"))
    text = unicodedata.normalize("NFC", text)
    simple = (unicodedata.normalize("NFKD", letter)[0] for letter in text)
    pairs = ((letter, plain if plain.isascii() else "?") for letter, plain in zip(text, simple, strict=True))
    return "".join(plain if bytes(font.getmask(letter)) == missing else letter for letter, plain in pairs), font


def shades(values: Tensor) -> Image.Image:
    """(H, W), not negative -> RGB image of that size: white is 0, dark blue the largest."""
    level = (values / values.max().clamp(min=1e-12)).sqrt()
    return ImageOps.colorize(to_image(2 * level[None] - 1).convert("L"), black="white", white=(12, 30, 90))
