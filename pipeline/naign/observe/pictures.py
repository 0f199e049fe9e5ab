"""Grids of images, as PIL images. No plotting library."""

import io
import unicodedata
from collections.abc import Sequence
from itertools import filterfalse

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from naign.data.scale import eight_bits

CELL = 48  # pixels: smallest side of an image in a grid, to which smaller ones are enlarged
GAP = 3  # pixels between images
SIZE = 14  # pixels: of text
TEXT = (118, 118, 118, 255)  # contrast of 4.5 on white and on black


def to_image(image: Tensor, *, least: int = 1) -> Image.Image:
    """(C, H, W) in [-1, 1] -> RGB image with sides of at least `least` pixels. Of C other than 3 the first is shown."""
    channels, height, width = image.shape
    if channels != 3:
        image = image[:1].expand(3, height, width)
    pixels = eight_bits(image).permute(1, 2, 0)
    picture = Image.fromarray(pixels.contiguous().numpy())
    factor = max(1, -(-least // min(height, width)))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def grid(images: Tensor, *, columns: int) -> Image.Image:
    """(n, C, H, W) in [-1, 1] -> one image, filled row by row."""
    return rows([("", part) for part in images.split(columns)])


def rows(labelled: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Rows of (label, images (n, C, H, W)) -> one image with the labels, if any, at the left."""
    font = ImageFont.load_default(SIZE)
    margin = 0
    longest = 0
    for label, images in labelled:
        longest = max(longest, len(images))
        if label:
            margin = max(margin, int(font.getlength(legible(label))) + 12)
    cell = to_image(labelled[0][1][0], least=CELL)
    width = cell.width + GAP
    height = cell.height + GAP
    size = (margin + longest * width - GAP, len(labelled) * height - GAP)
    canvas = Image.new("RGBA", size)
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(labelled):
        top = row * height
        draw.text(
            (0, top + cell.height // 2),
            legible(label),
            fill=TEXT,
            font=font,
            anchor="lm",
        )
        for column, image in enumerate(images):
            picture = to_image(image, least=CELL)
            canvas.paste(picture, (margin + column * width, top))
    return canvas


def legible(text: str) -> str:
    """The text in ASCII, which Pillow's own font has: letters lose accents, others become question marks."""
    letters = unicodedata.normalize("NFKD", text)
    plain = filterfalse(unicodedata.combining, letters)
    return "".join(plain).encode("ascii", "replace").decode()
