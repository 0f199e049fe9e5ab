"""f repairs photographs damaged in several ways better than BM3D, non-local means or a median filter.

    pip install scikit-image PyWavelets bm3d
    python benchmarks/photos.py cut UNPACKED --to data/photographs
    naign pack folder --root data/photographs --size 256 --encoding npy --to data/photos
    naign train --config photos
    python benchmarks/photos.py measure runs/photos --to benchmarks/results/photos --picture docs/photos.jpg

`cut` makes what is trained on from Debian's packages budgie-backgrounds, lomiri-wallpapers-16.04, mate-backgrounds and
plasma-workspace-wallpapers, each unpacked (`dpkg -x`) below UNPACKED: the JPEGs of the folders in TREES that are not
drawings (DRAWN), reduced to a shorter side of 600 pixels or more by a factor of at most 4, in squares of 256.

`measure` takes the central 256 x 256 pixels of photographs that scikit-learn and scikit-image ship, unchanged in scale.
They are damaged as in `naign/data/degrade.py`; in `mixture` by each of the four kinds with probability 1/2 and a
strength that is uniform in [0, 1], at least two of them. f was trained on other damage (`photo` in
`naign/data/damage.py`) and is not given the kind. BM3D is given the root mean square of what the damage changed, which
for `noise` suits it better than the 0.5 before clamping. Non-local means estimate the noise.
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
from output import Record, check_place, page, write
from PIL import Image
from scipy.ndimage import median_filter
from torch import Tensor

from naign.data.damage import KINDS, degrade
from naign.data.scale import eight_bits, scaled
from naign.errors import InputError, exit_on_input_error
from naign.evaluate.restoration import psnr, ssim
from naign.model.naign import NAIGN

TREES = (
    "backgrounds/budgie/*.jpg",
    "backgrounds/*_by_*.jpg",
    "backgrounds/mate/nature/*.jpg",
    "wallpapers/*/contents/images/2560x1600.jpg",
)
DRAWN = ("ocean-waves", "valley-midnight", "waves-midnight", "analogpattern", "umang", "Autumn")
SIDE = 256
SHOWN = "astronaut"
Method = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class Cut:
    """Cut the photographs to train on out of unpacked packages."""

    unpacked: tyro.conf.Positional[Path]
    """Folder with the unpacked packages."""
    to: Path
    """Where to write squares as PNG."""

    def run(self) -> None:
        photos = []
        for tree in TREES:
            for path in sorted(self.unpacked.glob(f"**/usr/share/{tree}")):
                if not any(name in str(path) for name in DRAWN):
                    photos.append(path)
        if not photos:
            raise InputError(f"{self.unpacked} holds no such photographs: unpack the packages there with dpkg -x")
        self.to.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(photos):
            photo = Image.open(path).convert("RGB")
            factor = min(photo.size) // 600
            photo = photo.reduce(min(4, max(1, factor)))
            for top in range(0, photo.height - SIDE + 1, SIDE):
                for left in range(0, photo.width - SIDE + 1, SIDE):
                    box = (left, top, left + SIDE, top + SIDE)
                    square = photo.crop(box)
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
        photos = test_photographs()
        clean = torch.cat([central(photo) for photo in photos.values()])
        repairers = methods(NAIGN.from_pretrained(self.model), clean)
        found: dict[str, Record] = {}
        seconds = dict.fromkeys(repairers, 0.0)
        for damage in (*KINDS, "mixture"):
            parts = []
            for number, photo in enumerate(clean.split(1)):
                parts.append(damage_one(photo, damage, number))
            damaged = torch.cat(parts)
            answers = {"input": damaged}
            for name, repair in repairers.items():
                begin = time.process_time()
                answers[name] = repair(damaged)
                seconds[name] += time.process_time() - begin
            found[damage] = {}
            for name, answer in answers.items():
                found[damage][name] = (psnr(answer, clean), ssim(answer, clean))
            if self.picture and damage == "mixture":
                self.draw(answers, list(photos).index(SHOWN))
        area = len(found) * clean[:, 0].numel() / 1e6
        speed = {name: spent / area for name, spent in seconds.items()}
        text = page_of(found, speed) + f"\n{len(clean)} photographs: {', '.join(photos)}.\n"
        write(self.to, text, {"damages": found, "seconds_per_megapixel": speed})
        print(text)

    def draw(self, answers: dict[str, Tensor], number: int) -> None:
        assert self.picture is not None
        chosen = [answers[name][number] for name in ("input", "f", "BM3D")]
        strip = eight_bits(torch.cat(chosen, 2))
        strip = strip.permute(1, 2, 0).numpy()
        Image.fromarray(strip).save(self.picture, quality=90)


def page_of(found: dict[str, Record], speed: dict[str, float]) -> str:
    rows = []
    for damage, answers in found.items():
        cells = [f"{ratio:.2f} / {likeness:.3f}" for ratio, likeness in answers.values()]
        rows.append([damage, *cells])
    seconds = [f"{value:.1f}" for value in speed.values()]
    rows.append(["processor s per 10⁶ pixels", "-", *seconds])
    return page("Repair of photographs, PSNR in dB / SSIM", ["", "input", *speed], rows)


def test_photographs() -> dict[str, Tensor]:
    """Colour photographs (1, 3, H, W) in [-1, 1], by name."""
    from skimage import data

    pixels = {}
    folder = Path(sklearn.datasets.__file__).parent / "images"
    for path in sorted(folder.glob("*.jpg")):
        pixels[path.stem] = np.asarray(Image.open(path))
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        pixels[name] = getattr(data, name)()
    photos = {}
    for name, array in pixels.items():
        image = torch.from_numpy(array.transpose(2, 0, 1).copy())
        photos[name] = scaled(image[None])
    return photos


def central(photo: Tensor) -> Tensor:
    """Its central SIDE x SIDE pixels."""
    top = (photo.shape[2] - SIDE) // 2
    left = (photo.shape[3] - SIDE) // 2
    return photo[:, :, top : top + SIDE, left : left + SIDE]


def damage_one(image: Tensor, damage: str, number: int) -> Tensor:
    """An image (1, C, H, W), damaged by one kind, or by a mixture that depends on the number."""
    if damage != "mixture":
        return degrade(image, damage, seed=number)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(number)
    happens = torch.zeros(len(KINDS), dtype=torch.bool)
    while happens.sum() < 2:
        happens = torch.rand(len(KINDS), generator=generator) < 0.5
    strengths = happens * torch.rand(len(KINDS), generator=generator)
    for kind, strength in zip(KINDS, strengths.tolist(), strict=True):
        image = degrade(image, kind, seed=number, strength=strength)
    return image


def methods(model: NAIGN, clean: Tensor) -> dict[str, Method]:
    """What repairs images (n, C, H, W) in [-1, 1], by name."""
    from bm3d import bm3d, bm3d_rgb
    from skimage.restoration import denoise_nl_means, estimate_sigma

    def each(repair: Callable[[Any, float], Any], damaged: Tensor) -> Tensor:
        """By a function of an array (H, W, C) in [0, 1] and of the root mean square of the damage there."""
        made = []
        for image, truth in zip(damaged, clean, strict=True):
            error = (image - truth).square().mean()
            level = float(error.sqrt()) / 2
            given = ((image + 1) / 2).permute(1, 2, 0)
            array = repair(given.double().numpy(), level)
            array = np.ascontiguousarray(array.transpose(2, 0, 1))
            made.append(torch.from_numpy(2 * array - 1))
        return torch.stack(made).float().clamp(-1, 1)

    def collaborative(array: Any, level: float) -> Any:
        if np.ptp(array, axis=2).any():
            return bm3d_rgb(array, level)
        grey = bm3d(array[:, :, 0], level)  # bm3d_rgb would divide by the range of each difference of colours
        return np.stack([grey] * 3, axis=2)

    def non_local(array: Any, level: float) -> Any:
        sigma = estimate_sigma(array, channel_axis=-1, average_sigmas=True)
        return denoise_nl_means(
            array,
            h=0.8 * sigma,
            sigma=sigma,
            patch_size=5,
            patch_distance=6,
            fast_mode=True,
            channel_axis=-1,
        )

    def median(array: Any, level: float) -> Any:
        return median_filter(array, size=(3, 3, 1))

    return {
        "f": model.project,
        "BM3D": partial(each, collaborative),
        "non-local means": partial(each, non_local),
        "median 3 x 3": partial(each, median),
    }


if __name__ == "__main__":
    with exit_on_input_error("photos"):
        cut = Annotated[Cut, tyro.conf.subcommand("cut")]
        measure = Annotated[Measure, tyro.conf.subcommand("measure")]
        tyro.cli(cut | measure).run()  # type: ignore[operator]
