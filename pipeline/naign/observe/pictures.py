"""Grids of images and drawings of 2-D point sets, as PIL images. No plotting library."""

import io
import unicodedata
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 48  # pixels: smallest side of an image in a grid, to which smaller ones are enlarged
GAP = 3  # pixels between images
PANEL = 320  # pixels: side of a panel of points
SIZE = 14  # pixels: of text
TEXT = (118, 118, 118, 255)  # contrast of 4.5 on white and on black
BLUE = (45, 108, 223, 255)
ORANGE = (224, 122, 31, 255)


def to_image(image: Tensor, *, least: int = 1) -> Image.Image:
    """(C, H, W) in [-1, 1] -> RGB image with sides of at least `least` pixels. Of C other than 3 the first is shown."""
    channels, height, width = image.shape
    if channels != 3:
        image = image[:1].expand(3, height, width)
    pixels = eight_bits(image).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    factor = max(1, -(-least // min(height, width)))
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
    width, height = to_image(labelled[0][1][0], least=CELL).size
    size = (margin + longest * (width + GAP) - GAP, len(labelled) * (height + GAP) - GAP)
    canvas = Image.new("RGBA", size)
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(labelled):
        top = row * (height + GAP)
        draw.text((0, top + height // 2), legible(label), fill=TEXT, font=font, anchor="lm")
        for column, image in enumerate(images):
            canvas.paste(to_image(image, least=CELL), (margin + column * (width + GAP), top))
    return canvas


def scatter(panels: Sequence[tuple[str, Tensor]], *, behind: Tensor) -> Image.Image:
    """Panels (title, points (n, d)), the first two coordinates in orange, over `behind` (m, d) in blue, the scale."""
    low = behind[:, :2].min(0).values
    high = behind[:, :2].max(0).values
    centre = (low + high) / 2
    half = 1.25 * max(float((high - low).max()) / 2, 1e-6)  # of a square, with a margin
    canvas = Image.new("RGBA", (len(panels) * (PANEL + GAP) - GAP, PANEL + 22))
    for number, (title, points) in enumerate(panels):
        left = number * (PANEL + GAP)
        panel = Image.new("RGBA", (PANEL, PANEL), (127, 127, 127, 24))
        pen = ImageDraw.Draw(panel)
        for cloud, colour in ((behind, BLUE), (points, ORANGE)):
            dots = ((cloud[:, :2] - centre) / half).clamp(-1, 1) * torch.tensor([1.0, -1.0])
            places = ((dots + 1) / 2 * (PANEL - 3)).round().int()
            for x, y in places.tolist():
                pen.rectangle((x, y, x + 1, y + 1), fill=colour)
        canvas.paste(panel, (left, 22))
        font = ImageFont.load_default(SIZE)
        ImageDraw.Draw(canvas).text((left, 3), legible(title), fill=TEXT, font=font)
    return canvas


def legible(text: str) -> str:
    """The text in ASCII, which Pillow's own font has: letters lose accents, others become question marks."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return plain.encode("ascii", "replace").decode()
