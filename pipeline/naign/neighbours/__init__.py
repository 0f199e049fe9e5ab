"""Exact nearest neighbours in whole data sets: samples that copy training images."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CopiesOptions:
    """Options of `naign copies`; the comments are their help."""

    # Distance, in levels of 255, up to which images are alike; default: that of the nearest 1 % of test images.
    threshold: float | None = None
    data: str | None = None  # Packed data set; default: the one it was trained on.
    samples: int = 10_000  # How many samples to draw.
    seed: int = 0  # The same seed draws the same samples.
    to: str = ""  # Folder or s3://bucket/prefix for copies.json, .csv and .png; default: the run's evaluation/.
