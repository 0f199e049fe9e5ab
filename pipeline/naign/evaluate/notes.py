"""What a reader must know beside the numbers of an evaluation: where they do not compare, and why."""

from typing import Any

from naign.evaluate.measures import Subject
from naign.model.encoders import Pixels

FEW = 1000  # with fewer examples a Frechet distance on 64 features is mostly bias


def write_notes(
    subject: Subject,
    metrics: dict[str, Any],
    lost: int,
) -> list[str]:
    """How the numbers compare with others; `lost` is how many are not finite."""
    manifest = subject.manifest
    counts = subject.counts
    samples = counts["samples"]
    learned = subject.model.metadata.get("dataset")
    second = metrics["second"]
    notes = []
    if learned and learned != manifest.name:
        here = f"The network learned {learned} and is measured on {manifest.name}, with the encoder for those"
        notes.append(f"{here}: no number here says how well it does what it was trained for.")
    if samples < subject.samples:
        notes.append(f"Only {samples:,} of {subject.samples:,} samples: examples of this size fill the memory.")
    if isinstance(subject.encoder.network, Pixels) and subject.is_image:
        pooled = "distances on it are on pooled pixels, which see layout and colour, not detail, and not classes"
        notes.append(f"No encoder trained on {manifest.name} {manifest.shape} ships: {pooled}.")
    if metrics["fd"]["once_ratio"] is None:
        notes.append("Training and test split are alike, so that no distance is a multiple of theirs.")
    least = min(samples, counts["test"], counts["floor"])
    if least < FEW or second and least < 4 * second["features"]:
        biased = f"Fréchet distances rest on as few as {least:,} examples: much of their value is bias"
        notes.append(f"{biased}. Compare them with others of the same counts only.")
    if not subject.repairs:
        notes.append("This f takes points, or repairs none of its images: repair and energy do not apply.")
    if lost:
        notes.append(f"{lost} numbers are left out, since they are not finite: the network has diverged.")
    return notes
