"""The measurements of an evaluation, in order: each takes the subject and returns its part of metrics.json.

Applying f is nearly all the cost, so each application serves several measurements. `Subject.counts` records how many
examples each number is based on.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.data.decode import scaled
from pipeline.data.degrade import KINDS
from pipeline.data.format.manifest import Manifest
from pipeline.data.loader import read_split
from pipeline.errors import InputError
from pipeline.evaluate import coverage, density, restoration
from pipeline.evaluate.coverage import NEIGHBOURS
from pipeline.evaluate.frechet import frechet_distance
from pipeline.model.encoders import Encoder
from pipeline.model.naign import NAIGN

MEDIAN = 10_000  # training images from which the per-pixel median and the mean brightness are computed
ROUNDING = 1e-6  # share of the test features' variance; a smaller floor is rounding, and no ratio to it is given
VALUES = 2**27  # of one set in memory at most (512 MB of float32): large images are measured on fewer examples


def within(wanted: int, shape: tuple[int, ...]) -> int:
    """`wanted`, or as many examples of that shape as fit in memory."""
    return min(wanted, max(1, VALUES // int(torch.Size(shape).numel())))


@dataclass(kw_only=True)
class Subject:
    """The model and the data to measure it on. Tensors are on the CPU, shuffled by the seed: a prefix is a sample."""

    model: NAIGN
    manifest: Manifest
    encoder: Encoder
    train: Tensor  # (n, *shape) in storage type
    test: Tensor  # (m, *shape) in the model's scale
    seed: int
    once: Tensor = field(init=False)  # f(z): (samples, *shape)
    twice: Tensor = field(init=False)  # f(f(z))
    counts: dict[str, int] = field(default_factory=dict)  # how many examples each number is based on

    @property
    def is_image(self) -> bool:
        return self.manifest.kind == "image"


def read(model: NAIGN, path: str, encoder: Encoder, manifest: Manifest, *, seed: int, crop: int = 0) -> Subject:
    """Read both splits, as much as fits, in an order drawn by the seed. Raises InputError if one is too small."""
    generator, splits = torch.Generator().manual_seed(seed), list[Tensor]()
    for split, wanted in (("train", 100_000), ("test", 10_000)):
        images, _ = read_split(path, split, limit=within(wanted, manifest.shape), crop=crop)
        if len(images) <= NEIGHBOURS:
            raise InputError(
                f"{path} has {len(images)} examples in its {split} split, too few to measure with: give a data set "
                f"with more than {NEIGHBOURS} in each split, with --data"
            )
        splits.append(images[torch.randperm(len(images), generator=generator)])
    counts = {"train": len(splits[0]), "test": len(splits[1])}
    train, test = splits[0], scaled(splits[1])
    return Subject(model=model, manifest=manifest, encoder=encoder, train=train, test=test, seed=seed, counts=counts)


def draw(subject: Subject, samples: int) -> None:
    """Draw the samples f(z), and f(f(z))."""
    subject.once = subject.model.sample(samples, seed=subject.seed).cpu()  # else on the model's device
    subject.twice = subject.model.project(subject.once)
    subject.counts["samples"] = samples


def overlap(subject: Subject) -> dict[str, Any]:
    """Frechet distances, coverage and modes, all from the features of one pass of the encoder over each set."""
    encoder, counts = subject.encoder, subject.counts
    counts["floor"] = min(counts["samples"], len(subject.train))
    train = encoder.features(scaled(subject.train[: counts["floor"]]))
    test, once, twice = (encoder.features(data) for data in (subject.test, subject.once, subject.twice))
    floor, first, second = (frechet_distance(features, test) for features in (train, once, twice))
    apart = floor > ROUNDING * float(test.double().var(0).sum())
    counts["coverage"] = number = min(10_000, len(test), len(once))
    cover = asdict(coverage.coverage(test[:number], once[:number]))
    counts["coverage_train"] = number = min(number, len(train))
    cover["train"] = asdict(coverage.coverage(test[:number], train[:number]))
    shares = coverage.mode_shares(encoder.logits(subject.once)) if encoder.labels else None
    ratios = {"once_ratio": first / floor if apart else None, "twice_ratio": second / floor if apart else None}
    return {
        "fd": {"floor": floor, "once": first, "twice": second, **ratios},
        "coverage": cover,
        "modes": shares,
        "modes_min": min(shares) if shares else None,
        "classes": list(encoder.labels) or None,
    }


def copying(subject: Subject) -> tuple[dict[str, Any], Tensor]:
    """Distances of samples and of test data to their nearest training example; and those of the first samples."""
    reference = scaled(subject.train[: within(60_000, subject.manifest.shape)])
    number = min(1000, len(subject.once), len(subject.test))
    samples, indices = coverage.nearest(subject.once[:number], reference)
    test, _ = coverage.nearest(subject.test[:number], reference)
    subject.counts |= {"nearest": number, "nearest_reference": len(reference)}
    mine, unseen = float(samples.double().mean()), float(test.double().mean())
    near = {"samples": mine, "test": unseen, "ratio": mine / unseen if unseen else None}
    return {"nearest": near | {"smallest": float(samples.min())}}, reference[indices[:12]]


def repairs(subject: Subject, number: int, *, shown: int = 10) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Restoration of every damage and idempotence on damaged images; and the first `shown` of every answer.

    {"restoration": None} for points.
    """
    if not subject.is_image:
        return {"restoration": None, "idempotence": {"damaged": None}}, {}
    clean = subject.test[:number]
    reference = scaled(subject.train[: within(20_000, subject.manifest.shape)])
    typical = restoration.median(subject.train[:MEDIAN])
    tables, pictures, moves = dict[str, Any](), dict[str, dict[str, Tensor]](), []
    project, seed = subject.model.project, subject.seed
    for kind in KINDS:
        answers = restoration.repair(clean, kind, project, typical=typical, reference=reference, seed=seed)
        tables[kind] = restoration.scores(answers, clean)
        moves.append(restoration.mae(answers["twice"], answers["once"]))
        pictures[kind] = {name: answer[:shown].clone() for name, answer in answers.items()}
    subject.counts |= {
        "restoration": len(clean),
        "similarity": min(1000, len(clean)),
        "restoration_reference": len(reference),
        "median": min(MEDIAN, len(subject.train)),
    }
    return {"restoration": tables, "idempotence": {"damaged": sum(moves) / len(moves)}}, pictures


def fixed_points(subject: Subject, number: int) -> tuple[dict[str, Any], Tensor]:
    """Reconstruction error of test data, and their energies (n,) from the same application of f."""
    clean = subject.test[:number]
    answer = subject.model.project(clean)
    energies = (answer - clean).square().flatten(1).mean(1)
    subject.counts["reconstruction"] = len(clean)
    moved = {"samples": restoration.mae(subject.twice, subject.once)}
    return {"reconstruction": restoration.mae(answer, clean), "idempotence": moved}, energies


def separation(subject: Subject, energies: Tensor, number: int) -> dict[str, Any]:
    """AUROC of the energy against outliers made from the first `number` test images; None for points."""
    if not subject.is_image:
        return {"density": None}
    subject.counts["density"] = number = min(number, len(energies))
    typical, energy = float(subject.train[:MEDIAN].double().mean()) / 127.5 - 1, subject.model.energy
    images, own = subject.test[:number], energies[:number]
    return {"density": density.separation(images, own, energy, typical_brightness=typical, seed=subject.seed)}
