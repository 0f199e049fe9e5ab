"""The measurements of an evaluation, in order: each takes the subject and returns its part of metrics.json.

Applying f is nearly all the cost, so every application is used for as much as it can tell, and how many examples each
number rests on stands in `counts`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.data.decode import scaled
from pipeline.data.degrade import KINDS
from pipeline.data.format.manifest import Manifest
from pipeline.data.loader import read_split
from pipeline.evaluate import NEIGHBOURS, coverage, density, restoration
from pipeline.evaluate.frechet import frechet_distance
from pipeline.model.encoders import Encoder
from pipeline.model.naign import NAIGN

MEDIAN = 10_000
"""Training images of which the per-pixel median and the mean brightness are taken."""
ROUNDING = 1e-6
"""Of the test features' variance: training and test data as near as that are the same, and are no measure."""
VALUES = 2**27
"""Most values of one set held in memory (512 MB of float32): large images are measured on fewer examples."""


def within(wanted: int, shape: tuple[int, ...]) -> int:
    """At most `wanted` examples of that shape, fewer if they would not fit in memory."""
    return min(wanted, max(1, VALUES // int(torch.Size(shape).numel())))


@dataclass(kw_only=True)
class Subject:
    """What is measured, and on what. All tensors are on the CPU; shuffled by the seed, so that a prefix is a sample."""

    model: NAIGN
    manifest: Manifest
    encoder: Encoder
    train: Tensor
    """(n, *shape) in storage type."""
    test: Tensor
    """(m, *shape) in the model's scale."""
    seed: int
    once: Tensor = field(init=False)
    """f(z): (samples, *shape)."""
    twice: Tensor = field(init=False)
    """f(f(z))."""
    counts: dict[str, int] = field(default_factory=dict)
    """On how many examples each number rests."""

    @property
    def is_image(self) -> bool:
        """Whether the data are images, not points."""
        return self.manifest.kind == "image"


def read(model: NAIGN, path: str, encoder: Encoder, manifest: Manifest, *, seed: int, crop: int = 0) -> Subject:
    """Read train and test split, as much as fits, in an order drawn by the seed. Raises InputError."""
    limit = within(100_000, manifest.shape)
    generator = torch.Generator().manual_seed(seed)
    train, _ = read_split(path, "train", limit=limit, crop=crop)
    test, _ = read_split(path, "test", limit=within(10_000, manifest.shape), crop=crop)
    train = train[torch.randperm(len(train), generator=generator)]
    test = scaled(test)[torch.randperm(len(test), generator=generator)]
    subject = Subject(model=model, manifest=manifest, encoder=encoder, train=train, test=test, seed=seed)
    subject.counts |= {"train": len(train), "test": len(test)}
    return subject


def draw(subject: Subject, samples: int) -> None:
    """Draw the samples f(z) and apply f to them once more."""
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
    cover = asdict(coverage.coverage(test[:number], once[:number], k=NEIGHBOURS))
    counts["coverage_train"] = number = min(number, len(train))
    cover["train"] = asdict(coverage.coverage(test[:number], train[:number], k=NEIGHBOURS))
    shares = coverage.mode_shares(encoder.logits(subject.once)) if encoder.labels else None
    return {
        "fd": {
            "floor": floor,
            "once": first,
            "twice": second,
            "once_ratio": first / floor if apart else None,
            "twice_ratio": second / floor if apart else None,
        },
        "coverage": cover,
        "modes": shares,
        "modes_min": min(shares) if shares else None,
        "classes": list(encoder.labels) or None,
    }


def copying(subject: Subject) -> tuple[dict[str, Any], Tensor]:
    """Distance of samples and of test data to their nearest training example, and those examples of the samples."""
    reference = scaled(subject.train[: within(60_000, subject.manifest.shape)])
    number = min(1000, len(subject.once), len(subject.test))
    samples, indices = coverage.nearest(subject.once[:number], reference)
    test, _ = coverage.nearest(subject.test[:number], reference)
    subject.counts |= {"nearest": number, "nearest_reference": len(reference)}
    near = {
        "samples": float(samples.double().mean()),
        "test": float(test.double().mean()),
        "ratio": float(samples.double().mean() / test.double().mean()) if test.any() else None,
        "smallest": float(samples.min()),
    }
    return {"nearest": near}, reference[indices[:12]]


def repairs(subject: Subject, number: int, *, shown: int = 10) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Restoration of every damage, and idempotence on what was damaged; and the first `shown` of every answer."""
    clean = subject.test[:number]
    reference = scaled(subject.train[: within(20_000, subject.manifest.shape)])
    typical = restoration.median(subject.train[:MEDIAN])
    tables: dict[str, Any] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    moves = []
    for kind in KINDS:
        answers = restoration.repair(
            clean,
            kind,
            subject.model.project,
            typical=typical,
            reference=reference,
            seed=subject.seed,
        )
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
    return {
        "reconstruction": restoration.mae(answer, clean),
        "idempotence": {"samples": restoration.mae(subject.twice, subject.once)},
    }, energies


def separation(subject: Subject, energies: Tensor, number: int) -> dict[str, Any]:
    """AUROC of the energy against outliers made from the first `number` test images."""
    number = min(number, len(energies))
    subject.counts["density"] = number
    return {
        "density": density.separation(
            subject.test[:number],
            energies[:number],
            subject.model.energy,
            typical_brightness=float(subject.train[:MEDIAN].double().mean()) / 127.5 - 1,
            seed=subject.seed,
        )
    }
