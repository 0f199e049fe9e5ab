"""The pictures of an evaluation's report."""

import torch
from torch import Tensor

from pipeline.evaluate.measures import Subject
from pipeline.evaluate.report import DAMAGE, Picture
from pipeline.observe.pictures import grid, heat, rows, scatter

STEPS = 12  # images of an interpolation


def draw_pictures(subject: Subject) -> list[Picture]:
    """Pictures of images: samples, repairs, and samples over their nearest training images; of 2-D points."""
    if subject.is_image:
        return _of_images(subject)
    return _of_points(subject) if subject.test.shape[1] == 2 else []


def _of_images(subject: Subject) -> list[Picture]:
    noise = subject.model.latent(torch.arange(10), seed=subject.seed).cpu()
    times = [("z", noise), ("f once", subject.once[:10]), ("f twice", subject.twice[:10])]
    for count in (3, 4, 5):
        times.append((f"{count} times", subject.model.project(times[-1][1])))
    chosen = "f(z): the network applied once to z. The first that were drawn, not selected."
    alike = "A column is one z. For a perfect projection all rows below the first are alike."
    way = "f(z) on the way from one z, left, to another, right: along an arc where z is, or is made of, Gaussian noise."
    drawn = [
        Picture("samples", "Samples", chosen, grid(subject.once[:96], columns=16)),
        Picture("applications", "The same z, f applied one to five times", alike, rows(times)),
        Picture("interpolation", "Between two samples", way, grid(_between(subject), columns=STEPS)),
    ]
    blind = "Test images. f does not know how they were damaged. Last row: the nearest training image, an answer that "
    blind += "needs no network."
    shown = {"damaged": "input", "f once": "once", "f twice": "twice", "nearest": "nearest"}
    for kind, answers in subject.repaired.items():
        lines = [("clean", subject.test[: len(answers["input"])])]
        lines += [(label, answers[name]) for label, name in shown.items()]
        drawn.append(Picture(f"restoration_{kind}", f"Repair: {DAMAGE[kind].lower()}", blind, rows(lines)))
    copied = "Alike in kind is good; the same image would be a copy."
    both = rows([("f(z)", subject.once[: len(subject.neighbours)]), ("training", subject.neighbours)])
    return [*drawn, Picture("neighbours", "Samples over their nearest training image", copied, both)]


def _between(subject: Subject) -> Tensor:
    """Six rows of STEPS images (6 * STEPS, *shape), each between the first samples of two seeds."""
    seeds = range(subject.seed, subject.seed + 6)
    ways = [subject.model.between(seed, seed + 1, steps=STEPS) for seed in seeds]
    return subject.model.project(torch.cat(ways)).cpu()


def _of_points(subject: Subject) -> list[Picture]:
    real = subject.test[:2000]
    panels = [("test data", real[:0]), ("f(z)", subject.once[:2000]), ("f(f(z))", subject.twice[:2000])]
    away = "|f(x) − x| over the plane, white where f leaves a point alone, which should be the data alone."
    moved = heat(lambda x: subject.model.energy(x).sqrt(), behind=real)
    return [
        Picture("samples", "Samples", "Orange over the test data in blue.", scatter(panels, behind=real)),
        Picture("distance", "How far f moves a point", away, moved),
    ]
