"""Damage to learn from, drawn anew every time an image is seen, and damage of known strength to measure repair by.

To learn from (`find_damage`), each image of its own kinds and strengths:
    noise  Gaussian noise of a standard deviation that is uniform in [0, strength].
    mixed  (images only) each of four with probability 1/2, one after another: detail lost (averaged down to between 1/2
           and 1/8 of the height, enlarged, mixed with the original), noise as above, specks (up to 40 % of the pixels
           take one shade each), and stripes (up to 40 % of the rows, or columns, take one shade). One image in sixteen
           is erased before, to one shade, every second time black, so that no flat image stays what it is.
    mild   as mixed, but each of the four with probability 1/3: one image in five stays whole, to learn reconstruction.
    photo  as mild, but no image is erased: flat parts of photographs are to stay what they are.
    holes  as mild, and then every second image loses up to two boxes, a stroke of three lines, or both, filled with the
           mean of what is left, as `NAIGN.project` begins with a mask.
Other packages add more as entry points of group naign.damage, each a `Damage`.

To measure by (`degrade`), of images in [-1, 1] (black is -1):
    blur          9x9 Gaussian kernel, sigma 2, edges reflected
    noise         Gaussian noise, sigma 0.5, clamped to [-1, 1]
    salt_pepper   20 % of the pixels replaced, half by white, half by black; all channels of a pixel together
    rows          five random rows set black
Images less than 28 pixels high are damaged in proportion: blur has sigma 2 * H / 28, and round(5 * H / 28) rows, at
least one, are blackened. Sigmas, the share of pixels and the number of rows are multiplied by the strength.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from naign.errors import InputError
from naign.settings.registry import lookup

# Damage to learn from

SCALARS = 16  # uniform numbers that `mixed` and `mild` take for an image besides those of its pixels
HOLES = 18  # that `holes` takes besides


class Damage(NamedTuple):
    """A damage to learn from."""

    damage: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """Damaged images (n, *shape), a function of the arguments alone, row by row: images (n, *shape) float32 in [-1, 1],
    standard normals (n, *shape), uniform numbers (n, uniforms(shape)) in (0, 1], and the noise's largest standard
    deviation. All but `noise` stay in [-1, 1]."""
    uniforms: Callable[[tuple[int, ...]], int]  # how many uniform numbers an image of that shape takes
    check: Callable[[tuple[int, ...]], None]  # raises InputError for a shape that cannot be damaged so


def find_damage(name: str) -> Damage:
    """The damage of that name, also of another package; InputError where there is none."""
    return lookup("objective.damage", name, DAMAGES, "naign.damage")


def _noise(
    images: Tensor,
    normals: Tensor,
    uniform: Tensor,
    strength: float,
) -> Tensor:
    deviation = strength * uniform[:, 0].view(-1, *(1,) * (images.ndim - 1))
    return images + deviation * normals


def _parts(shape: tuple[int, ...]) -> list[int]:
    """How many uniform numbers `mixed` takes for an image of that shape: for all of it, for pixels, and for lines."""
    _, height, width = shape
    return [SCALARS, 2 * height * width, 2 * max(height, width)]


def _count_mixed(shape: tuple[int, ...]) -> int:
    return sum(_parts(shape))


def _check_mixed(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise InputError(f"this objective.damage needs images of at least 8x8, not {shape}: choose noise")


def _mixed(
    images: Tensor,
    normals: Tensor,
    uniform: Tensor,
    strength: float,
    *,
    each: float = 1 / 2,
    erase: float = 1 / 16,
) -> Tensor:
    count, _, height, width = images.shape
    scalars, pixels, lines = uniform.split(_parts(images.shape[1:]), dim=1)
    (
        weight,
        spread,
        octaves,
        specks,
        colour,
        side,
        _,
        tone,
        is_coarse,
        is_noisy,
        is_specked,
        is_striped,
        stripes,
        shade,
        is_erased,
        level,
    ) = scalars[..., None, None, None].unbind(1)  # each (n, 1, 1, 1)

    blank = torch.where(level < 0.5, -1.0, 4 * level - 3)
    out = torch.where(is_erased < erase, blank, images)

    coarse = _coarse(out, 1 + 2 * octaves, weight.sqrt())
    out = torch.where(is_coarse < each, coarse, out)

    noisy = (out + strength * spread * normals).clamp(-1, 1)
    out = torch.where(is_noisy < each, noisy, out)

    hit, shades = pixels.view(count, 2, height, width).split(1, dim=1)
    any_shade = 2 * shades - 1
    black_or_white = 2 * (shades > 0.5) - 1.0
    speck = torch.where(colour < 0.5, black_or_white, any_shade)
    specked = (is_specked < each) & (hit < 0.4 * specks)
    out = torch.where(specked, speck, out)

    struck = lines.view(count, 2, -1) < 0.4 * stripes[:, :, 0]
    across = struck[:, 0, :height].view(-1, 1, height, 1)
    along = struck[:, 1, :width].view(-1, 1, 1, width)
    striped = torch.where(side < 0.75, across, along)
    tint = torch.where(tone < 0.75, -1.0, 2 * shade - 1)
    return torch.where((is_striped < each) & striped, tint, out)


def _coarse(images: Tensor, octaves: Tensor, weight: Tensor) -> Tensor:
    """Images mixed, by a weight in [0, 1], with themselves at 2**-octaves of their height, octaves in [1, 3]."""
    height, width = images.shape[2:]
    levels = []
    for factor in (2, 4, 8):
        rows = max(2, round(height / factor))
        columns = max(2, round(width / factor))
        small = F.adaptive_avg_pool2d(images, (rows, columns))
        level = F.interpolate(small, size=(height, width), mode="bilinear")
        levels.append(level)
    half, quarter, eighth = levels
    low = torch.where(octaves < 2, half, quarter)
    high = torch.where(octaves < 2, quarter, eighth)
    between = low + octaves.frac() * (high - low)
    coarse = torch.where(octaves >= 3, eighth, between)
    mixed: Tensor = images + weight * (coarse - images)
    return mixed


def _with_holes(
    images: Tensor,
    normals: Tensor,
    uniform: Tensor,
    strength: float,
) -> Tensor:
    damaged = _mild(
        images,
        normals,
        uniform[:, :-HOLES],
        strength,
    )
    size = images.shape[2:]
    kind, box, line = uniform[:, -HOLES:].split([1, 8, 9], dim=1)
    kind = kind.view(-1, 1, 1, 1)
    is_boxed = kind < 1 / 3
    is_struck = (kind > 1 / 6) & (kind < 1 / 2)
    boxed = boxes(box.view(-1, 2, 4), size) & is_boxed
    struck = stroke(line, size) & is_struck
    hole = boxed | struck
    return torch.where(hole, known_mean(damaged, ~hole), damaged)


def boxes(numbers: Tensor, size: torch.Size) -> Tensor:
    """Where two boxes are (n, 1, H, W); numbers (n, 2, 4) give centres and sides, of at most 3/4 of the image's."""
    y, x, high, wide = numbers[..., None].unbind(2)  # each (n, 2, 1)
    rows = (_centres(size[0], numbers) - y).abs() < 3 / 8 * high
    columns = (_centres(size[1], numbers) - x).abs() < 3 / 8 * wide
    both = rows[..., None] & columns[..., None, :]
    return both.any(1, keepdim=True)


def stroke(numbers: Tensor, size: torch.Size) -> Tensor:
    """Where a stroke is (n, 1, H, W); numbers (n, 9) give four points and a radius, of at most 1/10 of the image."""
    points = numbers[:, :8].view(-1, 4, 2)
    radius = 0.02 + 0.08 * numbers[:, 8].view(-1, 1, 1, 1)
    y, x = torch.meshgrid(
        _centres(size[0], numbers),
        _centres(size[1], numbers),
        indexing="ij",
    )
    place = torch.stack([y, x], dim=-1)  # (H, W, 2)
    first = points[:, :-1, None, None]
    along = points.diff(dim=1)[:, :, None, None]
    length = along.square().sum(-1, keepdim=True).clamp(min=1e-12)
    share = ((place - first) * along).sum(-1, keepdim=True) / length
    apart = place - first - share.clamp(0, 1) * along
    distance = apart.square().sum(-1).sqrt()
    return (distance < radius).any(1, keepdim=True)


def _centres(length: int, like: Tensor) -> Tensor:
    """Positions of pixels along a side, in [0, 1]."""
    return (torch.arange(length, device=like.device) + 0.5) / length


def known_mean(images: Tensor, known: Tensor) -> Tensor:
    """Mean of each channel of images (n, C, H, W) where `known` (bool, broadcast to them) is true: (n, C, 1, 1)."""
    count = known.expand_as(images).sum((2, 3), keepdim=True)
    total = images.where(known, 0).sum((2, 3), keepdim=True)  # elsewhere they may be NaN
    return total / count.clamp(min=1)


_mild = partial(_mixed, each=1 / 3)
_photo = partial(_mixed, each=1 / 3, erase=0.0)

DAMAGES: dict[str, Damage] = {
    "noise": Damage(_noise, lambda shape: 1, lambda shape: None),
    "mixed": Damage(_mixed, _count_mixed, _check_mixed),
    "mild": Damage(_mild, _count_mixed, _check_mixed),
    "photo": Damage(_photo, _count_mixed, _check_mixed),
    "holes": Damage(_with_holes, lambda shape: _count_mixed(shape) + HOLES, _check_mixed),
}

# Damage to measure by

Kind = Literal["blur", "noise", "salt_pepper", "rows"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REFERENCE_HEIGHT = 28  # height in pixels for which the damages are defined; lower images get proportionally less


def degrade(
    images: Tensor,
    kind: Kind,
    *,
    seed: int = 0,
    strength: float = 1.0,
) -> Tensor:
    """(n, C, H, W) float32 in [-1, 1] -> damaged images of the same shape and range; a function of the arguments."""
    if strength == 0:
        return images
    count, channels, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    small = min(1.0, height / REFERENCE_HEIGHT)
    if kind == "blur":
        sigma = 2.0 * small * strength
        kernel = gaussian_kernel(sigma).expand(channels, 1, 9, 9)
        mode = "reflect" if min(height, width) > 4 else "replicate"
        padded = F.pad(images, (4, 4, 4, 4), mode=mode)
        return F.conv2d(padded, kernel, groups=channels).clamp(-1, 1)
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator)
        return (images + 0.5 * strength * noise).clamp(-1, 1)
    if kind == "salt_pepper":
        chance = torch.rand(
            count,
            1,
            height,
            width,
            generator=generator,
        )
        salted = torch.where(chance < 0.1 * strength, 1.0, images)
        return torch.where(chance >= 1 - 0.1 * strength, -1.0, salted)
    order = torch.rand(count, height, generator=generator).argsort(1)
    rows = order.argsort(1) < max(1, round(5 * small * strength))
    return images.masked_fill(rows[:, None, :, None], -1.0)


def gaussian_kernel(sigma: float = 2.0) -> Tensor:
    """(9, 9) float32 Gaussian kernel that sums to 1; sigma in pixels."""
    offsets = torch.arange(-4, 5, dtype=torch.float64)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = torch.outer(weights, weights)
    return (kernel / kernel.sum()).float()
