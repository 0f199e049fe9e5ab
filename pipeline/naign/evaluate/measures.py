"""The measurements of an evaluation: each takes the subject and returns its part of metrics.json.

Applying f is nearly all the cost, so measurements share it. `Subject.counts` has the examples behind each number.
"""

import math
import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from naign.data.damage import KINDS
from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.images import Images
from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.errors import InputError
from naign.evaluate import coverage, restoration
from naign.evaluate.coverage import NEIGHBOURS
from naign.evaluate.frechet import frechet_distance
from naign.evaluate.inception import features_of, inception_distances
from naign.model.encoders import Encoder
from naign.model.naign import NAIGN

ROUNDING = 1e-6  # share of the test features' variance; a smaller floor is rounding, and no ratio to it is given
FLOORS = 5  # draws of training data whose distances the floor is the mean of, where there are as many
REPAIRED = 2_500  # test images for each damage; f is applied to each twice
SHOWN = 10  # repairs of each kind kept for pictures
STREAMED = 500  # images whose features are found at once
VALUES = 2**27  # of one set in memory at most (512 MB of float32): large images are measured on fewer examples


def within(wanted: int, shape: tuple[int, ...]) -> int:
    """`wanted`, or as many examples of that shape as fit in memory."""
    return min(wanted, max(1, VALUES // math.prod(shape)))


@dataclass(kw_only=True)
class Subject:
    """The model and the data to measure it on. Tensors are on the CPU, shuffled by the seed: a prefix is a sample."""

    model: NAIGN
    manifest: Manifest
    encoder: Encoder
    second: Encoder | None  # another that Frechet distances are computed on
    inception: tuple[nn.Module, Images] | None = None  # what FID is computed on, and the whole training split
    fid_samples: int = 0
    train: Tensor  # (n, *shape) in storage type
    test: Tensor  # (m, *shape) in the model's scale
    samples: int  # wanted
    seed: int
    once: Tensor = field(init=False)  # f(z): (samples, *shape), as many as fit
    twice: Tensor = field(init=False)  # f(f(z))
    latents: Tensor | None = None  # z, where f decodes it: then it is a sample itself
    real: Tensor | None = None  # f of training data, where f decodes z: no prior passes their distance
    noise: Tensor | None = None  # f of noise, where samples are drawn from a prior: the other sampler
    neighbours: Tensor = field(init=False)  # the training examples that are nearest to the first samples
    repaired: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # SHOWN of every answer, by damage and answer
    counts: dict[str, int] = field(default_factory=dict)  # how many examples each number is based on

    @property
    def is_image(self) -> bool:
        return self.manifest.kind == "image"

    @property
    def repairs(self) -> bool:
        """Whether f is meant to repair images: not points, and not where it only carries latents to images."""
        return self.is_image and not getattr(self.model.network, "generates_only", False)


def read(
    data: DataConfig,
    shape: tuple[int, ...],
    *,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Both splits, shuffled: training in storage type, test in the model's scale.

    Raises InputError if one is too small, or its examples too large.
    """
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for split, wanted in ((data.split, 100_000), ("test", 10_000)):
        images, _ = read_split(data, split, limit=within(wanted, shape))
        if len(images) <= NEIGHBOURS:
            few = f"{data.path} has {len(images)} examples in its {split} split that fit in memory, too few to measure"
            raise InputError(f"{few}: give more than {NEIGHBOURS} with --data, or smaller ones (data.size, data.crop)")
        order = torch.randperm(len(images), generator=generator)
        splits.append(images[order])
    return splits[0], scaled(splits[1])


def draw_samples(subject: Subject) -> dict[str, Any]:
    """Draw f(z) and f(f(z)). Returns the cost of f(z) in processor seconds, and that of z alone where it is decoded."""
    model = subject.model
    number = within(subject.samples, model.shape)
    begin = time.process_time()
    latents = draw_latents(subject, number)
    drawn = time.process_time()
    subject.once = model.project(latents)
    spent = time.process_time() - begin
    subject.twice = model.project(subject.once)
    if model.has_prior:
        subject.noise = model.project(draw_latents(subject, number, latents="noise"))
    subject.counts |= {"samples": number, "test": len(subject.test)}
    sampling = {"samples": number, "cpu_seconds": spent, "latents_cpu_seconds": None}
    if model.prior.decodes:
        subject.latents = latents
        subject.real = model.project(scaled(subject.train[:number]))
        sampling["latents_cpu_seconds"] = drawn - begin
    return {"sampling": sampling}


def draw_latents(subject: Subject, number: int, **options: Any) -> Tensor:
    """The first latents z of the evaluation's seed, (number, *shape), on the CPU."""
    parts = []
    for ids in torch.arange(number).split(500):
        latents = subject.model.latent(ids, seed=subject.seed, **options)
        parts.append(latents.cpu())
    return torch.cat(parts)


def distances(
    encoder: Encoder,
    subject: Subject,
    draws: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Frechet distances to the test data of: as many training data as samples (floor), z where it is a sample itself
    (latents, else None), f(z) (once), f(f(z)) (twice), f of training data where z is decoded (real, else None), f of
    noise where z is of a prior (noise, else None). And the features of all these, and of test.

    The floor is the mean over `draws` disjoint draws of training data, or as many as there are. Where there are fewer
    training data than samples, multiples of the floor are those of as many samples, since distances of few are larger.
    """
    test = encoder.features(subject.test)
    number = min(len(subject.once), len(subject.train))
    drawn = []
    for part in subject.train[: draws * number].split(number):
        if len(part) == number:
            drawn.append(encoder.features(scaled(part)))
    floor = fmean(frechet_distance(part, test) for part in drawn)
    variance = float(test.double().var(0).sum())
    floor_is_rounding = floor <= ROUNDING * variance
    fd: dict[str, Any] = {"floor": floor}
    features = {"test": test, "floor": drawn[0]}
    sets = {
        "once": subject.once,
        "twice": subject.twice,
        "latents": subject.latents,
        "real": subject.real,
        "noise": subject.noise,
    }
    for name, samples in sets.items():
        fd[name] = None
        fd[f"{name}_ratio"] = None
        if samples is None:
            continue
        features[name] = encoder.features(samples)
        fd[name] = frechet_distance(features[name], test)
        if not floor_is_rounding:
            fd[f"{name}_ratio"] = frechet_distance(features[name][:number], test) / floor
    return fd, features


def overlap(subject: Subject) -> dict[str, Any]:
    """Frechet distances, coverage and modes, all from the features of one pass of the encoder over each set."""
    encoder = subject.encoder
    counts = subject.counts
    fd, features = distances(encoder, subject, FLOORS)
    number = min(10_000, len(subject.test), len(subject.once))
    counts["floor"] = len(features["floor"])
    counts["floors"] = min(FLOORS, len(subject.train) // counts["floor"])
    counts["coverage"] = number
    covers = {}
    for name, part in features.items():
        if name not in ("test", "twice", "real"):
            rows = min(number, len(part))
            covers[name] = coverage.coverage(features["test"][:rows], part[:rows])
    cover: dict[str, Any] = covers.pop("once")
    cover["train"] = covers.pop("floor")
    found: dict[str, Any] = {
        "fd": fd,
        "coverage": cover | covers,
        "modes": None,
        "test_modes": None,
        "classes": None,
        "asked": None,
    }
    if encoder.labels:
        seen = encoder.logits(subject.once)
        found |= {
            "modes": coverage.mode_shares(seen),
            "test_modes": coverage.mode_shares(encoder.logits(subject.test)),
            "classes": list(encoder.labels),
            "asked": as_asked(subject, seen),
        }
    return found


def as_asked(subject: Subject, logits: Tensor) -> dict[str, Any] | None:
    """Share of samples that the encoder's classifier sees in the class that they were drawn from.

    `logits` (n, classes) are of the samples. None for a model without classes, or where the encoder has others.
    """
    ids = torch.arange(len(logits))
    labels = subject.model.choose(ids, seed=subject.seed)
    if labels is None or subject.encoder.labels != subject.model.labels:
        return None
    right = logits.argmax(1) == labels.cpu()
    return {"share": float(right.double().mean())}


def second_opinion(subject: Subject) -> dict[str, Any]:
    """Frechet distances on the second encoder; None without one."""
    encoder = subject.second
    if encoder is None:
        return {"second": None}
    fd, features = distances(encoder, subject, 1)
    width = features["test"].shape[1]
    return {"second": {"encoder": encoder.name, "features": width, **fd}}


def inception(subject: Subject) -> dict[str, Any]:
    """FID and KID of `fid_samples` f(z) against all training images; None without Inception."""
    if subject.inception is None:
        return {"inception": None}
    network, images = subject.inception
    model = subject.model
    made = []
    for ids in torch.arange(subject.fid_samples).split(STREAMED):
        samples = model.project(model.latent(ids, seed=subject.seed))
        made.append(features_of(network, samples))
    seen = []
    for first in range(0, len(images), STREAMED):
        last = min(first + STREAMED, len(images))
        seen.append(features_of(network, images.read(first, last)))
    return {"inception": inception_distances(torch.cat(made), torch.cat(seen))}


def copying(subject: Subject) -> dict[str, Any]:
    """Distances of samples and of test data to their nearest training example."""
    reference = scaled(subject.train[: within(60_000, subject.model.shape)])
    number = min(1000, len(subject.once), len(subject.test))
    samples, indices = coverage.nearest(subject.once[:number], reference)
    test, _ = coverage.nearest(subject.test[:number], reference)
    subject.counts |= {"nearest": number, "nearest_reference": len(reference)}
    subject.neighbours = reference[indices[:12]]
    mine = float(samples.double().mean())
    unseen = float(test.double().mean())
    ratio = None
    if unseen:
        ratio = mine / unseen
    return {"nearest": {"samples": mine, "test": unseen, "ratio": ratio}}


def repairs(subject: Subject) -> dict[str, Any]:
    """Reconstruction error of test data; restoration of every damage, None where f repairs nothing; idempotence on
    samples, on f of noise where samples are a prior's, and on damaged images.
    """
    clean = subject.test[:REPAIRED]
    moved = None
    if subject.noise is not None:
        moved = restoration.mae(subject.model.project(subject.noise), subject.noise)
    found: dict[str, Any] = {
        "reconstruction": restoration.mae(subject.model.project(clean), clean),
        "restoration": None,
        "idempotence": {
            "samples": restoration.mae(subject.twice, subject.once),
            "noise": moved,
            "damaged": None,
        },
    }
    if not subject.repairs:
        return found
    reference = scaled(subject.train[: within(20_000, subject.model.shape)])
    tables = {}
    moves = []
    for kind in KINDS:
        answers = restoration.repair(
            clean,
            kind,
            subject.model.project,
            reference=reference,
            seed=subject.seed,
        )
        tables[kind] = restoration.scores(answers, clean)
        moves.append(restoration.mae(answers["twice"], answers["once"]))
        subject.repaired[kind] = {name: answer[:SHOWN].clone() for name, answer in answers.items()}
    subject.counts |= {
        "restoration": len(clean),
        "similarity": min(restoration.SIMILAR, len(clean)),
        "restoration_reference": len(reference),
    }
    found["restoration"] = tables
    found["idempotence"]["damaged"] = fmean(moves)
    return found


STAGES = {
    "drawing samples, applying f": draw_samples,
    "distance and coverage": overlap,
    "distance on a second encoder": second_opinion,
    "FID and KID": inception,
    "nearest training examples": copying,
    "reconstruction and repair": repairs,
}
"""The measurements in order, by what a terminal shows meanwhile."""
