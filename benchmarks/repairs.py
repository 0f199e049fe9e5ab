"""How well f repairs CIFAR-10's test images, beside a U-Net trained for repair at equal cost and BM3D.

    pip install -e benchmarks/baselines scikit-image PyWavelets bm3d
    python benchmarks/repairs.py --to benchmarks/results/repairs

f is that of cifar10_cpu.yaml before its prior is fitted. The U-Net learns from the same damage with the same loss; set
--images so that it takes as many processor seconds, which the .json has as `costs`. Damages are those of
`naign.data.damage.degrade`, of which both have seen random mixtures, and two that neither has seen: JPEG of quality 10,
and motion over 7 pixels along a row. BM3D is given the root mean square of what the damage changed; non-local means
estimate the noise (photos.py).

The perceptual distance is 1 less the cosine of features of efficientnet-lite2, a mean over images.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from output import ROOT, Record, check_place, page, write
from photos import methods
from PIL import Image
from torch import Tensor
from trained import Task, packed

from naign.data.damage import KINDS, degrade
from naign.data.loader import read_split
from naign.data.scale import eight_bits, scaled
from naign.errors import exit_on_input_error
from naign.evaluate.restoration import psnr, ssim
from naign.model.encoders import Encoder, load_encoder
from naign.model.naign import NAIGN

CONFIG = "configs/cifar10_cpu.yaml"
ALONE = ("--prior.name=none",)
UNET = (*ALONE, "--model.name=unet", "--model.width=32")
QUALITY = 10  # of JPEG
LENGTH = 7  # pixels: of motion


@dataclass(kw_only=True, slots=True)
class Settings:
    """Train what is missing, and make the table."""

    to: Path = Path("benchmarks/results/repairs")
    """Where to write, without an ending."""
    count: int = 100
    """Test images. BM3D takes three seconds an image."""
    images: int = 225_280
    """Images that the U-Net learns from."""
    seed: int = 0
    """Of both networks."""
    runs: Path = Path("runs/tables")
    """Folder of the runs."""


def jpeg(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] as JPEG of quality QUALITY shows them."""
    shown = []
    for image in eight_bits(images).permute(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, "JPEG", quality=QUALITY)
        pixels = bytearray(Image.open(file).convert("RGB").tobytes())
        shown.append(torch.frombuffer(pixels, dtype=torch.uint8).view(image.shape))
    return scaled(torch.stack(shown).permute(0, 3, 1, 2))


def moved(images: Tensor) -> Tensor:
    """Images averaged over LENGTH pixels along each row, edges reflected."""
    side = LENGTH // 2
    padded = F.pad(images, (side, side, 0, 0), mode="reflect")
    return F.avg_pool2d(padded, (1, LENGTH), stride=1)


def damages() -> dict[str, Callable[[Tensor], Tensor]]:
    """What damages images (n, 3, H, W), by name."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for kind in KINDS:
        found[kind] = partial(degrade, kind=kind)
    return found | {"JPEG, unseen": jpeg, "motion, unseen": moved}


def perceptual(encoder: Encoder, estimates: Tensor, clean: Tensor) -> float:
    """The distance that the head of this file names."""
    likeness = F.cosine_similarity(encoder.features(estimates), encoder.features(clean))
    return float(1 - likeness.mean())


@torch.inference_mode()
def main(settings: Settings) -> None:
    check_place(settings.to)
    torch.set_num_threads(1)
    data = packed("data/cifar10", "cifar10")
    options = {
        "f": ALONE,
        "U-Net": (*UNET, f"--train.images={settings.images}"),
    }
    networks = {}
    for name, chosen in options.items():
        networks[name] = Task.of(
            settings.runs,
            CONFIG,
            chosen,
            settings.seed,
        )
        networks[name].train()
    images, _ = read_split(str(ROOT / data), "test")
    clean = scaled(images[: settings.count])
    models = {name: NAIGN.from_pretrained(str(task.trained)) for name, task in networks.items()}
    repairers = methods(models["f"], clean) | {"U-Net": models["U-Net"].project}
    order = ["f", "U-Net", "BM3D", "non-local means", "median 3 x 3"]
    encoder = load_encoder("efficientnet-lite2")
    found: dict[str, Record] = {}
    for damage, apply in damages().items():
        damaged = apply(clean)
        answers = {"damaged": damaged}
        for name in order:
            answers[name] = repairers[name](damaged)
        found[damage] = {}
        for name, answer in answers.items():
            found[damage][name] = (
                psnr(answer, clean),
                ssim(answer, clean),
                perceptual(encoder, answer, clean),
            )
    costs = {name: model.metadata["cpu_seconds"] for name, model in models.items()}
    rows = []
    for damage, row in found.items():
        cells = [damage]
        for ratio, likeness, far in row.values():
            cells.append(f"{ratio:.2f} / {likeness:.3f} / {far:.3f}")
        rows.append(cells)
    title = f"Repair of {settings.count} test images of CIFAR-10: PSNR in dB / SSIM / perceptual distance"
    text = page(title, ["", "damaged", *order], rows)
    write(settings.to, text, {"damages": found, "costs": costs})
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("repairs"):
        main(tyro.cli(Settings, description=__doc__))
