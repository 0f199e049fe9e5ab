"""Damage to learn from: each image its own kinds and strengths, drawn anew every time it is seen.

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
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from naign.errors import InputError
from naign.settings.registry import lookup

SCALARS = 16  # uniform numbers that `mixed` and `mild` take for an image besides those of its pixels
HOLES = 18  # that `holes` takes besides


class Damage(NamedTuple):
    damage: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """Damaged images (n, *shape), a function of the arguments alone, row by row: images (n, *shape) float32 in [-1, 1],
    standard normals (n, *shape), uniform numbers (n, uniforms(shape)) in (0, 1], and the noise's largest standard
    deviation. All but `noise` stay in [-1, 1]."""
    uniforms: Callable[[tuple[int, ...]], int]  # how many uniform numbers an image of that shape takes
    check: Callable[[tuple[int, ...]], None]  # raises InputError for a shape that cannot be damaged so


def find_damage(name: str) -> Damage:
    """The damage of that name, also of another package; InputError where there is none."""
    return lookup("objective.damage", name, DAMAGES, "naign.damage")


def _noise(images: Tensor, normals: Tensor, uniform: Tensor, strength: float) -> Tensor:
    return images + strength * uniform[:, 0].view((-1,) + (1,) * (images.ndim - 1)) * normals


def _count_mixed(shape: tuple[int, ...]) -> int:
    return SCALARS + 2 * shape[1] * shape[2] + 2 * max(shape[1:])


def _check_mixed(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise InputError(f"this objective.damage needs images of at least 8x8, not {shape}: choose noise")


def _mixed(
    images: Tensor, normals: Tensor, uniform: Tensor, strength: float, *, each: float = 1 / 2, erase: float = 1 / 16
) -> Tensor:
    rows = (len(images), 1, 1, 1)
    _, _, height, width = images.shape
    scalars, pixels, lines = uniform.split([SCALARS, 2 * height * width, 2 * max(height, width)], dim=1)
    chance, shade, reach, select, colour, side, _, tone = (part.view(rows) for part in scalars.split(1, dim=1)[:8])
    happens = [(part < each).view(rows) for part in scalars.split(1, dim=1)[8:12]]

    erased, level = scalars[:, 14].view(rows), scalars[:, 15].view(rows)
    blank = torch.where(level < 0.5, -1.0, 4 * level - 3)
    images = torch.where(erased < erase, blank, images)
    out = torch.where(happens[0], _coarse(images, 1 + 2 * reach, chance.sqrt()), images)
    out = torch.where(happens[1], (out + strength * shade * normals).clamp(-1, 1), out)

    hit, shades = pixels.view(len(images), 2, height, width).split(1, dim=1)
    flat = torch.where(colour < 0.5, 2 * (shades > 0.5) - 1.0, 2 * shades - 1)  # black and white, or any shade
    out = torch.where(happens[2] & (hit < 0.4 * select), flat, out)

    struck = lines.view(len(images), 2, -1) < 0.4 * scalars[:, 12].view(-1, 1, 1)
    across = struck[:, 0, :height].view(-1, 1, height, 1)
    along = struck[:, 1, :width].view(-1, 1, 1, width)
    stripes = torch.where(side < 0.75, across.expand(-1, 1, -1, width), along.expand(-1, 1, height, -1))
    tint = torch.where(tone < 0.75, -1.0, 2 * scalars[:, 13].view(rows) - 1)
    return torch.where(happens[3] & stripes, tint, out)


def _coarse(images: Tensor, octaves: Tensor, weight: Tensor) -> Tensor:
    """Images mixed, by a weight in [0, 1], with themselves at 2**-octaves of their height, octaves in [1, 3]."""
    height, width = images.shape[2:]
    levels = []
    for factor in (2, 4, 8):
        small = F.adaptive_avg_pool2d(images, (max(2, round(height / factor)), max(2, round(width / factor))))
        levels.append(F.interpolate(small, size=(height, width), mode="bilinear"))
    between = octaves.frac()
    low = torch.where(octaves < 2, levels[0], levels[1])
    high = torch.where(octaves < 2, levels[1], levels[2])
    coarse = torch.where(octaves >= 3, levels[2], low + between * (high - low))
    mixed: Tensor = images + weight * (coarse - images)
    return mixed


def _with_holes(images: Tensor, normals: Tensor, uniform: Tensor, strength: float) -> Tensor:
    damaged = _mixed(images, normals, uniform[:, :-HOLES], strength, each=1 / 3)
    chosen = uniform[:, -HOLES:]
    kind = chosen[:, 0].view(-1, 1, 1, 1)
    boxed = boxes(chosen[:, 1:9].view(-1, 2, 4), images.shape[2:])
    struck = stroke(chosen[:, 9:18], images.shape[2:])
    hole = (boxed & (kind < 1 / 3)) | (struck & (kind > 1 / 6) & (kind < 1 / 2))
    return torch.where(hole, known_mean(damaged, ~hole), damaged)


def boxes(numbers: Tensor, size: torch.Size) -> Tensor:
    """Where two boxes are (n, 1, H, W); numbers (n, 2, 4) give centres and sides, of at most 3/4 of the image's."""
    centre, half = numbers[..., :2], 3 / 8 * numbers[..., 2:]
    inside = [
        (_centres(length, numbers) - centre[..., axis, None]).abs() < half[..., axis, None]
        for axis, length in enumerate(size)
    ]
    return (inside[0][..., None] & inside[1][..., None, :]).any(1, keepdim=True)


def stroke(numbers: Tensor, size: torch.Size) -> Tensor:
    """Where a stroke is (n, 1, H, W); numbers (n, 9) give four points and a radius, of at most 1/10 of the image."""
    points, radius = numbers[:, :8].view(-1, 4, 2), 0.02 + 0.08 * numbers[:, 8].view(-1, 1, 1, 1)
    y, x = _centres(size[0], numbers)[:, None], _centres(size[1], numbers)[None]
    grid = torch.stack(torch.broadcast_tensors(y, x), dim=-1)  # (H, W, 2)
    first, along = points[:, :-1, None, None], points.diff(dim=1)[:, :, None, None]
    share = ((grid - first) * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp(min=1e-12)
    distance = (grid - first - share.clamp(0, 1) * along).square().sum(-1).sqrt()
    return (distance < radius).any(1, keepdim=True)


def _centres(length: int, like: Tensor) -> Tensor:
    """Positions of pixels along a side, in [0, 1]."""
    return (torch.arange(length, device=like.device) + 0.5) / length


def known_mean(images: Tensor, known: Tensor) -> Tensor:
    """Mean of each channel of images (n, C, H, W) where `known` (bool, broadcast to them) is true: (n, C, 1, 1)."""
    count = known.expand_as(images).sum((2, 3), keepdim=True).clamp(min=1)
    return images.where(known, 0).sum((2, 3), keepdim=True) / count  # elsewhere they may be NaN


DAMAGES: dict[str, Damage] = {
    "noise": Damage(_noise, lambda shape: 1, lambda shape: None),
    "mixed": Damage(_mixed, _count_mixed, _check_mixed),
    "mild": Damage(partial(_mixed, each=1 / 3), _count_mixed, _check_mixed),
    "photo": Damage(partial(_mixed, each=1 / 3, erase=0.0), _count_mixed, _check_mixed),
    "holes": Damage(_with_holes, lambda shape: _count_mixed(shape) + HOLES, _check_mixed),
}
