"""What a reader must know beside the numbers of an evaluation: where they do not compare, and why."""

from collections.abc import Iterator
from typing import Any

from naign.errors import InputError
from naign.evaluate.measures import Subject
from naign.model.encoders import load_encoder

FEW = 1000  # with fewer examples a Frechet distance on 64 features is mostly bias


def write_warnings(subject: Subject, trained_with: str, split: str) -> Iterator[str]:
    """Where the network may have been trained on what measures it; `trained_with` is the training's encoder or ""."""
    if split == "test":
        yield "The network was trained on the test split, which it is measured on: no number is of new data."
    measuring = {encoder.identity: encoder.name for encoder in (subject.encoder, subject.second) if encoder}
    trained, apart = "The network was trained with the encoder", "do not compare with those of"
    try:
        known = measuring.get(load_encoder(trained_with).identity) if trained_with else None
    except InputError:
        lost = f"{trained_with}, which is not there any more: if it is measured on that one, its distances"
        yield f"{trained} {lost} {apart} other networks."
    else:
        if known:
            on_it = f"{known}, which it is measured on: its Fréchet distances and coverage on it"
            yield f"{trained} {on_it} {apart} networks that were not."


def write_notes(subject: Subject, metrics: dict[str, Any], beyond: list[str]) -> Iterator[str]:
    """How the numbers compare with others; `beyond` are paths of numbers that are not finite."""
    encoder, manifest, counts = subject.encoder, subject.manifest, subject.counts
    learned, second = subject.model.metadata.get("dataset"), metrics["second"]
    if learned and learned != manifest.name:
        here = f"The network learned {learned} and is measured on {manifest.name}, with the encoder for those"
        yield f"{here}: no number here says how well it does what it was trained for."
    if (samples := counts["samples"]) < subject.samples:
        yield f"Samples were limited to {samples:,} of {subject.samples:,}: examples of this size fill the memory."
    if encoder.network is None and subject.is_image:
        pooled = "pixels pooled to at most 8×8, which see layout and colour, not detail, and no class is counted"
        data = f"{manifest.name} {manifest.shape} of {len(manifest.labels)} classes"
        others = f"distances not on {second['encoder']}" if second else "distances"
        yield f"No encoder trained on {data} ships: {others} are on {pooled}."
    if metrics["fd"]["once_ratio"] is None:
        yield "Training and test split are alike, so that no distance is a multiple of theirs."
    if counts["floor"] < samples:
        beside = f"There are {counts['floor']:,} training examples: distances beside the floor, and its multiples"
        yield f"{beside}, are of as many samples, and the coverage of training data is that of as many."
    least = min(samples, counts["test"], counts["floor"])
    biased = f"the floor's too, rest on as few as {least:,} examples, and much of their value is bias"
    if least < FEW:
        yield f"Fréchet distances, {biased}: compare them with others of the same counts only."
    elif second and least < 4 * second["features"]:
        yield f"{second['encoder']} has {second['features']:,} features: distances on it, {biased}."
    if not subject.is_image:
        yield "Points: repair, classes and energy against image outliers do not apply."
    elif not subject.repairs:
        yield "This f carries latents to images and repairs none: repair and energy do not apply."
    if beyond:
        yield f"Left out, since they are not finite: {', '.join(beyond)}. The network has diverged."
