"""The pictures of an evaluation's report."""

import math

import torch
from torch import Tensor

from pipeline.evaluate.measures import Subject
from pipeline.evaluate.report import DAMAGE, Picture
from pipeline.observe.pictures import grid, heat, rows, scatter

STEPS = 12
"""Images of an interpolation."""


def draw_pictures(subject: Subject, neighbours: Tensor, repaired: dict[str, dict[str, Tensor]]) -> list[Picture]:
    """Pictures of images: samples, repairs (by damage and answer), and samples over `neighbours`; of 2-D points."""
    if subject.is_image:
        return _of_images(subject, neighbours, repaired)
    return _of_points(subject) if subject.test.shape[1] == 2 else []


def _of_images(subject: Subject, neighbours: Tensor, repaired: dict[str, dict[str, Tensor]]) -> list[Picture]:
    noise = subject.model.latent(torch.arange(10), seed=subject.seed).cpu()
    times = [("noise z", noise), ("f once", subject.once[:10]), ("f twice", subject.twice[:10])]
    for count in (3, 4, 5):
        times.append((f"{count} times", subject.model.project(times[-1][1])))
    drawn = [
        Picture(
            name="samples",
            title="Samples",
            caption="f(z): the network applied once to noise. The first of those drawn, not chosen.",
            image=grid(subject.once[:96], columns=16),
        ),
        Picture(
            name="applications",
            title="The same noise, f applied one to five times",
            caption="A column is one noise. For a perfect projection all rows below the noise are alike.",
            image=rows(times),
        ),
        Picture(
            name="interpolation",
            title="Between two samples",
            caption="f(z) on the way from one noise, left, to another, right, along the arc between them.",
            image=grid(_between(subject), columns=STEPS),
        ),
    ]
    for kind, answers in repaired.items():
        clean = subject.test[: len(answers["input"])]
        lines = [("clean", clean), ("damaged", answers["input"]), ("f once", answers["once"])]
        lines += [("f twice", answers["twice"]), ("nearest", answers["nearest"])]
        drawn.append(
            Picture(
                name=f"restoration_{kind}",
                title=f"Repair: {DAMAGE[kind].lower()}",
                caption="Test images. f is not told what was done to them. Last row: the "
                "nearest training image, an answer that needs no network.",
                image=rows(lines),
            )
        )
    drawn.append(
        Picture(
            name="neighbours",
            title="Samples over their nearest training image",
            caption="Alike in kind is good; the same image would be a copy.",
            image=rows([("f(z)", subject.once[: len(neighbours)]), ("training", neighbours)]),
        )
    )
    return drawn


def _between(subject: Subject) -> Tensor:
    """Six rows of STEPS images (6 * STEPS, *shape) between two samples; cos and sin keep the variance of latents."""
    latents = subject.model.latent(torch.arange(12), seed=subject.seed)
    angle = torch.linspace(0, math.pi / 2, STEPS, device=latents.device).view(1, -1, *(1,) * len(subject.model.shape))
    way = angle.cos() * latents[:6, None] + angle.sin() * latents[6:, None]
    return subject.model.project(way.flatten(0, 1)).cpu()


def _of_points(subject: Subject) -> list[Picture]:
    real = subject.test[:2000]
    panels = [("test data", real), ("f(z)", subject.once[:2000]), ("f(f(z))", subject.twice[:2000])]
    return [
        Picture(
            name="samples",
            title="Samples",
            caption="Orange over the test data in blue.",
            image=scatter(panels, behind=real),
        ),
        Picture(
            name="distance",
            title="How far f moves a point",
            caption="|f(x) − x| over the plane, white where f leaves a point alone, which should be the data alone.",
            image=heat(lambda x: subject.model.energy(x).sqrt(), behind=real),
        ),
    ]
