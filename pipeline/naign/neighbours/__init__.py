"""Exact nearest neighbours in whole data sets: samples that copy training images, and near-duplicates."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every audit; the comments are their help."""

    # What is compared: pixels, or features of cifar10-cnn64, efficientnet-lite0, timm:NAME, or a .safetensors file.
    encoder: str = "pixels"
    # Distance up to which images are alike; default: for copies that of the nearest 1 % of test images, for duplicates
    # 10 levels of 255 for pixels.
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class CopiesOptions(Options):
    """Options of `naign copies`."""

    data: str | None = None  # Packed data set; default: the one it was trained on.
    samples: int = 10_000  # How many samples to draw.
    seed: int = 0  # The same seed draws the same samples.
    to: str = ""  # Folder or s3://bucket/prefix for copies.json, .csv and .png; default: the run's evaluation/.


@dataclass(frozen=True, kw_only=True)
class DuplicatesOptions(Options):
    """Options of `naign duplicates`."""

    data: str  # Folder or s3://bucket/prefix of shards.
    index: str = ""  # Folder or s3://bucket/prefix of index.json and page tables; default: beside the shards.
    to: str = "duplicates"  # Folder or s3://bucket/prefix for duplicates.json, groups.csv and groups.png.
