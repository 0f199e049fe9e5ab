"""The measurements of an evaluation: each takes the subject and returns its part of metrics.json.

Applying f is nearly all the cost, so measurements share it. `Subject.counts` has the examples behind each number.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from naign.data.damage import KINDS
from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.loader import read_split
from naign.errors import require
from naign.evaluate import coverage, density, restoration
from naign.evaluate.coverage import NEIGHBOURS
from naign.evaluate.frechet import frechet_distance
from naign.model.encoders import Encoder
from naign.model.naign import NAIGN
from naign.model.scale import scaled

MEDIAN = 10_000  # training images from which the per-pixel median and the mean brightness are computed
ROUNDING = 1e-6  # share of the test features' variance; a smaller floor is rounding, and no ratio to it is given
FLOORS = 5  # draws of training data whose distances the floor is the mean of, where there are as many
REPAIRED = 2_500  # test images for each damage; f is applied to each twice
OUTLIERS = 1_000  # test images from which outliers are made; f is applied about ten times as often
SHOWN = 10  # repairs of each kind kept for pictures
VALUES = 2**27  # of one set in memory at most (512 MB of float32): large images are measured on fewer examples


def within(wanted: int, shape: tuple[int, ...]) -> int:
    """`wanted`, or as many examples of that shape as fit in memory."""
    return min(wanted, max(1, VALUES // int(torch.Size(shape).numel())))


@dataclass
class Subject:
    """The model and the data to measure it on. Tensors are on the CPU, shuffled by the seed: a prefix is a sample."""

    model: NAIGN
    manifest: Manifest
    encoder: Encoder
    train: Tensor  # (n, *shape) in storage type
    test: Tensor  # (m, *shape) in the model's scale
    samples: int  # wanted
    seed: int
    labels: tuple[Tensor, Tensor]  # (n,) and (m,) int64: those of train and test
    latents: Tensor | None = None  # z, where f decodes it: then it is a sample itself
    second: Encoder | None = None  # another that Frechet distances are computed on
    progress: Callable[[float], object] = field(init=False)  # takes the finished share of the current measurement
    once: Tensor = field(init=False)  # f(z): (samples, *shape), as many as fit
    twice: Tensor = field(init=False)  # f(f(z))
    neighbours: Tensor = field(init=False)  # the training examples that are nearest to the first samples
    repaired: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # SHOWN of every answer, by damage and answer
    counts: dict[str, int] = field(init=False)  # how many examples each number is based on

    @property
    def is_image(self) -> bool:
        return self.manifest.kind == "image"

    @property
    def repairs(self) -> bool:
        """Whether f is meant to repair images: not points, and not where it only carries latents to images."""
        return self.is_image and not getattr(self.model.network, "generates_only", False)


def read(data: DataConfig, shape: tuple[int, ...], *, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Both splits, shuffled: training in storage type, test in the model's scale; and the labels of each.

    Raises InputError if one is too small, or its examples too large.
    """
    most = within(NEIGHBOURS + 1, shape)
    large = f"of examples of shape {shape} only {most} fit in memory, too few to measure with"
    require((most > NEIGHBOURS, f"{large}: train on smaller ones, with data.size or data.crop"))
    generator, splits, named = torch.Generator().manual_seed(seed), list[Tensor](), list[Tensor]()
    for split, wanted in ((data.split, 100_000), ("test", 10_000)):
        images, labels = read_split(data, split, limit=within(wanted, shape))
        few = f"{data.path} has {len(images)} examples in its {split} split, too few to measure with"
        require((len(images) > NEIGHBOURS, f"{few}: give a data set with more than {NEIGHBOURS} in each, with --data"))
        order = torch.randperm(len(images), generator=generator)
        splits.append(images[order])
        named.append(labels[order])
    return splits[0], scaled(splits[1]), (named[0], named[1])


def draw(subject: Subject) -> dict[str, Any]:
    """Draw f(z) and f(f(z)). Returns the cost of f(z) in processor seconds, and that of z alone where it is decoded."""
    number = within(subject.samples, subject.manifest.shape)
    subject.counts = {"train": len(subject.train), "test": len(subject.test), "samples": number}
    model, begin, done = subject.model, time.process_time(), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        subject.progress(done / number / 2)

    latents = torch.cat([model.latent(ids, seed=subject.seed).cpu() for ids in torch.arange(number).split(500)])
    drawn = time.process_time() - begin
    subject.once = model.project(latents, advance=advance)
    spent = time.process_time() - begin
    subject.twice = model.project(subject.once, advance=advance)
    subject.latents, decoded = (latents, drawn) if model.prior.decodes else (None, None)
    return {"sampling": {"samples": number, "cpu_seconds": spent, "latents_cpu_seconds": decoded}}


def distances(encoder: Encoder, subject: Subject, draws: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Frechet distances to the test data of: as many training data as samples (floor), z where it is a sample itself
    (latents, else None), f(z) (once), f(f(z)) (twice). And the features of all these, and of test.

    The floor is the mean over `draws` disjoint draws of training data, or as many as there are. Where there are fewer
    training data than samples, multiples of the floor are those of as many samples, since distances of few are larger.
    """
    counts = subject.counts
    counts["floor"] = number = min(counts["samples"], len(subject.train))
    sets = {"once": subject.once, "twice": subject.twice}
    sets |= {} if subject.latents is None else {"latents": subject.latents}
    test = encoder.features(subject.test)
    floors = [part for part in subject.train[: draws * number].split(number) if len(part) == number]
    made = list[Tensor]()
    for part in (*sets.values(), *floors):
        made.append(encoder.features(scaled(part)))  # samples are in the model's scale already
        subject.progress(len(made) / (len(sets) + len(floors)))
    features, drawn = dict(zip(sets, made, strict=False)), made[len(sets) :]
    fd: dict[str, Any] = {"latents": None} | {name: frechet_distance(part, test) for name, part in features.items()}
    features["floor"], fd["floor"] = drawn[0], fmean(frechet_distance(part, test) for part in drawn)
    apart = fd["floor"] > ROUNDING * float(test.double().var(0).sum())
    for name in ("latents", "once", "twice"):
        value = fd[name]
        if name in features and number < counts["samples"]:
            value = frechet_distance(features[name][:number], test)
        fd[f"{name}_ratio"] = value / fd["floor"] if apart and value is not None else None
    return fd, features | {"test": test}


def overlap(subject: Subject) -> dict[str, Any]:
    """Frechet distances, coverage and modes, all from the features of one pass of the encoder over each set."""
    encoder, counts = subject.encoder, subject.counts
    fd, features = distances(encoder, subject, FLOORS)
    counts["floors"] = min(FLOORS, len(subject.train) // counts["floor"])
    test, once = features["test"], features["once"]
    counts["coverage"] = number = min(10_000, len(test), len(once))
    cover: dict[str, Any] = coverage.coverage(test[:number], once[:number])
    if "latents" in features:
        cover["latents"] = coverage.coverage(test[:number], features["latents"][:number])
    counts["coverage_train"] = number = min(number, len(features["floor"]))
    cover["train"] = coverage.coverage(test[:number], features["floor"][:number])
    logits = encoder.logits(subject.once) if encoder.labels else None
    shares = None if logits is None else coverage.mode_shares(logits)
    modes = {"modes": shares, "modes_min": min(shares) if shares else None, "classes": list(encoder.labels) or None}
    asked = None if logits is None else as_asked(subject, logits, features)
    return {"fd": fd, "coverage": cover, "asked": asked} | modes


def as_asked(subject: Subject, logits: Tensor, features: dict[str, Tensor]) -> dict[str, Any] | None:
    """Share of samples that the encoder's classifier sees in the class that they were drawn from, in all and by class,
    and the Frechet distance of each class's samples to its test data, in multiples of what its training data have.

    `logits` (n, classes) are of the samples. None for a model without classes, or where the encoder has others.
    """
    labels = subject.model.choose(torch.arange(len(logits)), seed=subject.seed)
    if labels is None or subject.encoder.labels != subject.model.labels:
        return None
    labels = labels.cpu()
    right = (logits.cpu().argmax(1) == labels).double()
    of_class = [right[labels == number] for number in range(logits.shape[1])]
    shares = [float(part.mean()) if len(part) else None for part in of_class]
    train, test = subject.labels
    drawn = (features["once"], labels), (features["floor"], train[: len(features["floor"])]), (features["test"], test)
    ratios = [_class_ratio([rows[of == number] for rows, of in drawn]) for number in range(logits.shape[1])]
    return {"share": float(right.mean()), "by_class": shares, "fd_ratio_by_class": ratios}


def _class_ratio(sets: list[Tensor]) -> float | None:
    """How far the first rows of features are from the last, over what the second are; None for too few rows."""
    once, floor, test = (rows[: min(map(len, sets))] for rows in sets)
    least = frechet_distance(floor, test) if len(test) > NEIGHBOURS else 0.0
    return frechet_distance(once, test) / least if least > ROUNDING * float(test.double().var(0).sum()) else None


def second_opinion(subject: Subject) -> dict[str, Any]:
    """Frechet distances on the second encoder; None without one."""
    if subject.second is None:
        return {"second": None}
    fd, features = distances(subject.second, subject, 1)
    return {"second": {"encoder": subject.second.name, "features": features["test"].shape[1], **fd}}


def copying(subject: Subject) -> dict[str, Any]:
    """Distances of samples and of test data to their nearest training example."""
    reference = scaled(subject.train[: within(60_000, subject.manifest.shape)])
    number = min(1000, len(subject.once), len(subject.test))
    samples, indices = coverage.nearest(subject.once[:number], reference)
    test, _ = coverage.nearest(subject.test[:number], reference)
    subject.counts |= {"nearest": number, "nearest_reference": len(reference)}
    mine, unseen = float(samples.double().mean()), float(test.double().mean())
    near = {"samples": mine, "test": unseen, "ratio": mine / unseen if unseen else None}
    subject.neighbours = reference[indices[:12]]
    return {"nearest": near | {"smallest": float(samples.min())}}


def repairs(subject: Subject) -> dict[str, Any]:
    """Restoration of every damage, None where f repairs nothing; idempotence on samples and on damaged images."""
    moved = restoration.mae(subject.twice, subject.once)
    if not subject.repairs:
        return {"restoration": None, "idempotence": {"samples": moved, "damaged": None}}
    clean = subject.test[:REPAIRED]
    reference = scaled(subject.train[: within(20_000, subject.manifest.shape)])
    typical = scaled(subject.train[:MEDIAN].median(0).values)  # the lower one of an even number
    tables, moves = dict[str, Any](), []
    project, seed = subject.model.project, subject.seed
    for number, kind in enumerate(KINDS):
        subject.progress(number / len(KINDS))
        answers = restoration.repair(clean, kind, project, typical=typical, reference=reference, seed=seed)
        tables[kind] = restoration.scores(answers, clean)
        moves.append(restoration.mae(answers["twice"], answers["once"]))
        subject.repaired[kind] = {name: answer[:SHOWN].clone() for name, answer in answers.items()}
    counts = {"restoration": len(clean), "similarity": min(1000, len(clean)), "restoration_reference": len(reference)}
    subject.counts |= counts | {"median": min(MEDIAN, len(subject.train))}
    return {"restoration": tables, "idempotence": {"samples": moved, "damaged": sum(moves) / len(moves)}}


def fixed_points(subject: Subject) -> dict[str, Any]:
    """Reconstruction error of test data; AUROC of the energy against outliers, None where f repairs nothing."""
    clean = subject.test[:REPAIRED]
    answer = subject.model.project(clean)
    subject.counts["reconstruction"] = len(clean)
    errors: dict[str, Any] = {"reconstruction": restoration.mae(answer, clean), "density": None}
    if subject.repairs:
        images, typical = clean[:OUTLIERS], float(subject.train[:MEDIAN].double().mean()) / 127.5 - 1
        subject.counts["density"] = len(images)
        project, seed = subject.model.project, subject.seed
        errors["density"] = density.separation(images, project, typical_brightness=typical, seed=seed)
    return errors


STAGES = {
    "drawing samples, applying f": draw,
    "distance and coverage": overlap,
    "distance on a second encoder": second_opinion,
    "nearest training examples": copying,
    "reconstruction and energy": fixed_points,
    "repair": repairs,
}
"""The measurements in order, by the text of the progress bar."""
