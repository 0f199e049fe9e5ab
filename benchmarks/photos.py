"""Photographs repaired by f, beside BM3D, non-local means and a median filter.

    pip install scikit-image PyWavelets bm3d
    python benchmarks/photos.py cut UNPACKED --to data/photographs
    naign pack folder --root data/photographs --size 256 --encoding npy --to data/photos
    naign train --config photos
    python benchmarks/photos.py measure runs/photos --to benchmarks/results/photos --picture docs/photos.jpg

`cut` makes what is trained on from Debian's packages budgie-backgrounds, lomiri-wallpapers-16.04, mate-backgrounds and
plasma-workspace-wallpapers, each unpacked (`dpkg -x`) below UNPACKED: the JPEGs of the folders in TREES that are no
drawings (DRAWN), reduced to a shorter side of 600 pixels or more by a factor of at most 4, in squares of 256.

`measure` takes the central 256 x 256 pixels of photographs that scikit-learn and scikit-image ship, unchanged in
scale. They are damaged as in `naign/data/damage.py`; in `mixture` by each of the four kinds with probability 1/2
and a strength that is uniform in [0, 1], at least two of them. f was trained on other damage (`photo` in
`naign/data/damage.py`) and is not given the kind. BM3D is given the root mean square of what the damage changed,
which for `noise` suits it better than the 0.5 before clamping. Non-local means estimate the noise.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sklearn.datasets
import torch
import tyro
from PIL import Image
from scipy.ndimage import median_filter
from torch import Tensor
from trained import check_place, page, write

from naign.data.damage import KINDS, degrade
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.restoration import psnr, ssim
from naign.model import tiles
from naign.model.naign import NAIGN
from naign.model.scale import scaled
from naign.observe.pictures import eight_bits

TREES = ("backgrounds/budgie/*.jpg", "backgrounds/*_by_*.jpg", "backgrounds/mate/nature/*.jpg")
TREES += ("wallpapers/*/contents/images/2560x1600.jpg",)
DRAWN = ("ocean-waves", "valley-midnight", "waves-midnight", "analogpattern", "umang", "Autumn")
SIDE = 256
SHOWN = "astronaut"


@dataclass(kw_only=True)
class Cut:
    """Cut the photographs to train on out of unpacked packages."""

    unpacked: tyro.conf.Positional[Path]
    """Folder with the unpacked packages."""
    to: Path
    """Where to write squares as PNG."""

    def run(self) -> None:
        patterns = [f"**/usr/share/{tree}" for tree in TREES]
        paths = [path for pattern in patterns for path in sorted(self.unpacked.glob(pattern))]
        photos = [path for path in paths if not any(name in str(path) for name in DRAWN)]
        if not photos:
            raise InputError(f"{self.unpacked} holds no such photographs: unpack the packages there with dpkg -x")
        self.to.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(photos):
            photo = Image.open(path).convert("RGB")
            photo = photo.reduce(min(4, max(1, min(photo.size) // 600)))
            for top in range(0, photo.height - SIDE + 1, SIDE):
                for left in range(0, photo.width - SIDE + 1, SIDE):
                    square = photo.crop((left, top, left + SIDE, top + SIDE))
                    square.save(self.to / f"{number:03}-{top:04}-{left:04}.png")
        print(f"{len(photos)} photographs in {len(list(self.to.glob('*.png')))} squares: {self.to}/")


@dataclass(kw_only=True)
class Measure:
    """Measure a model beside other methods."""

    model: tyro.conf.Positional[str]
    """A run, a checkpoint or an exported folder."""
    to: Path = Path("benchmarks/results/photos")
    """Where to write, without an ending."""
    picture: Path | None = None
    """Where to write the damaged, the repaired and BM3D's picture of one photograph."""

    def run(self) -> None:
        check_place(self.to)
        torch.set_num_threads(1)
        model, photos = NAIGN.from_pretrained(self.model), test_photographs()
        clean = torch.cat([central(photo) for photo in photos.values()])
        found, rows, seconds = dict[str, Any](), list[list[str]](), dict[str, float]()
        for damage in (*KINDS, "mixture"):
            damaged = torch.cat([damage_one(clean[[number]], damage, number) for number in range(len(clean))])
            answers = {"input": damaged}
            for name, method in methods(model, clean).items():
                begin = time.process_time()
                answers[name] = method(damaged)
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - begin
            found[damage] = {name: (psnr(answer, clean), ssim(answer, clean)) for name, answer in answers.items()}
            rows.append([damage, *(f"{ratio:.2f} / {likeness:.3f}" for ratio, likeness in found[damage].values())])
            if self.picture and damage == "mixture":
                chosen = [answers[name][list(photos).index(SHOWN)] for name in ("input", "f", "BM3D")]
                strip = eight_bits(torch.cat(chosen, 2)).permute(1, 2, 0).numpy()
                Image.fromarray(strip).save(self.picture, quality=90)
        area = len(rows) * clean[:, 0].numel() / 1e6
        speed = {name: spent / area for name, spent in seconds.items()}
        rows.append(["processor s per 10⁶ pixels", "-", *(f"{value:.1f}" for value in speed.values())])
        borders = {name: seams(model, clean, noisy=name == "noise") for name in ("whole", "noise")}
        text = page("Repair of photographs, PSNR in dB / SSIM", ["", *found["blur"]], rows)
        text += f"\n{len(clean)} photographs: {', '.join(photos)}. "
        text += "Squared gradient across the lines where tiles begin, over that between them, "
        text += "at all positions: " + ", ".join(f"{value:.3f} ({name})" for name, value in borders.items())
        write(self.to, text + ".\n", {"damages": found, "seconds_per_megapixel": speed, "borders": borders})
        print(text)


def test_photographs() -> dict[str, Tensor]:
    """Colour photographs (1, 3, H, W) in [-1, 1], by name."""
    from skimage import data

    paths = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    pixels = {path.stem: np.asarray(Image.open(path)) for path in paths}
    pixels |= {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    return {name: scaled(torch.from_numpy(array.transpose(2, 0, 1).copy())[None]) for name, array in pixels.items()}


def central(photo: Tensor) -> Tensor:
    """Its central SIDE x SIDE pixels."""
    top, left = ((length - SIDE) // 2 for length in photo.shape[2:])
    return photo[:, :, top : top + SIDE, left : left + SIDE]


def damage_one(image: Tensor, damage: str, number: int) -> Tensor:
    """An image (1, C, H, W), damaged by one kind, or by a mixture that depends on the number."""
    if damage != "mixture":
        return degrade(image, damage, seed=number)  # type: ignore[arg-type]
    generator, happens = torch.Generator().manual_seed(number), torch.zeros(len(KINDS), dtype=torch.bool)
    while happens.sum() < 2:
        happens = torch.rand(len(KINDS), generator=generator) < 0.5
    for kind, strength in zip(KINDS, (happens * torch.rand(len(KINDS), generator=generator)).tolist(), strict=True):
        image = degrade(image, kind, seed=number, strength=strength)
    return image


Method = Callable[[Tensor], Tensor]


def methods(model: NAIGN, clean: Tensor) -> dict[str, Method]:
    """What repairs images (n, C, H, W) in [-1, 1], by name."""
    from bm3d import bm3d_rgb
    from skimage.restoration import denoise_nl_means, estimate_sigma

    def each(repair: Callable[[Any, float], Any], damaged: Tensor) -> Tensor:
        """By a function of an array (H, W, C) in [0, 1] and of what the damage changed there, its root mean square."""
        made = []
        for image, truth in zip(damaged, clean, strict=True):
            level = float((image - truth).square().mean().sqrt()) / 2
            array = repair(((image + 1) / 2).permute(1, 2, 0).double().numpy(), level)
            made.append(torch.from_numpy(2 * np.ascontiguousarray(array.transpose(2, 0, 1)) - 1))
        return torch.stack(made).float().clamp(-1, 1)

    def non_local(array: Any, level: float) -> Any:
        sigma = estimate_sigma(array, channel_axis=-1, average_sigmas=True)
        options = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "channel_axis": -1}
        return denoise_nl_means(array, h=0.8 * sigma, sigma=sigma, **options)

    return {
        "f": model.project,
        "f three times": partial(model.project, times=3),
        "BM3D": partial(each, bm3d_rgb),
        "non-local means": partial(each, non_local),
        "median 3 x 3": partial(each, lambda array, level: median_filter(array, size=(3, 3, 1))),
    }


def seams(model: NAIGN, clean: Tensor, *, noisy: bool) -> float:
    """Mean squared gradient of f(x) across the lines where tiles begin, over that across the lines between them; 1 is
    no seam. Tiles are moved over the photographs to all positions, so that each line is once where they begin.
    """
    side, step = model.shape[1], round(tiles.STEP * model.shape[1]) | 1
    room = (clean.shape[2] - step - side) // step * step  # a multiple of the step, so that all tiles are on their grid
    sums = torch.zeros(step, dtype=torch.float64)
    for shift in range(step):
        x = clean[:, :, shift : shift + room + side, shift : shift + room + side]
        y = model.project(degrade(x, "noise", seed=shift) if noisy else x)
        for dim in (2, 3):
            lines = y.diff(dim=dim).square().transpose(dim, 3).mean((0, 1, 2))[step - 1 : room + step - 1]
            sums += lines.view(-1, step).sum(0).double()
    return float(sums[0] / sums[1:].mean())


if __name__ == "__main__":
    with exit_on_input_error("photos"):
        commands = Annotated[Cut, tyro.conf.subcommand("cut")] | Annotated[Measure, tyro.conf.subcommand("measure")]
        tyro.cli(commands).run()  # type: ignore[call-overload]
