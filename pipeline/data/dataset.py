"""A packed data set as training sees it: its settings, its reader, its shape."""

from dataclasses import dataclass, field
from typing import cast

from pipeline.constraints import AT_LEAST_0, FREE, MAY_CHANGE, NOT_EMPTY, POSITIVE, between, check_fields, one_of
from pipeline.data.cache import CachedStore
from pipeline.data.format.manifest import Manifest
from pipeline.data.reader import Reader
from pipeline.errors import InputError
from pipeline.storage.base import Store
from pipeline.storage.store import open_store


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: str = field(default="data/mnist", metadata=MAY_CHANGE | NOT_EMPTY)
    """Folder or s3://bucket/prefix of shards with their index.json (`naign pack` or `naign index` makes it)."""
    source: str = field(default="", metadata=FREE)
    """What to fetch and pack at `path` where nothing is yet, as `naign pack` takes it, such as digits. Empty: nothing,
    but mnist at the default path."""
    endpoint: str = field(default="", metadata=FREE)
    """Address of an S3 server other than Amazon's; empty: AWS_ENDPOINT_URL or the AWS profile's."""
    split: str = "train"
    """Which split to train on."""
    workers: int = field(default=0, metadata=FREE | AT_LEAST_0)
    """Threads that read and decode on each rank; 0 is one, as 1 is. Decoding releases the interpreter's lock,
    so more threads help most with large images."""
    tail: str = "wrap"
    """Where an epoch is no whole number of rounds: wrap goes on into the next epoch, drop leaves its last images out,
    pad fills its last round with its first images."""
    resampled: bool = False
    """Draw shards with replacement instead of each once an epoch."""
    flip: bool = False
    """Mirror each image with probability 1/2."""
    crop: int = field(default=0, metadata=AT_LEAST_0)
    """Train on random windows of this many pixels a side; 0: on whole images."""
    broken: str = field(default="error", metadata=FREE | one_of(("error", "skip")))
    """A sample that cannot be decoded: error stops the run; skip logs it and takes the shard's next one instead."""
    broken_share: float = field(default=0.001, metadata=FREE | between(0, 1))
    """With broken=skip: the largest share of skipped samples before the run stops after all."""
    check: bool = field(default=True, metadata=FREE)
    """Check the SHA-256 of everything read, and read again what is wrong."""
    cache: str = field(default="", metadata=FREE)
    """Local folder that keeps what was read from s3://; ranks and pods may share it. Empty: none."""
    cache_gb: float = field(default=100.0, metadata=FREE | POSITIVE)
    """Size of the cache in GB (1e9 bytes); what was used least recently goes first."""
    trace: str = field(default="", metadata=FREE)
    """Folder in which every rank lists `epoch round key` of each image it trains on; empty: no list."""


def check_config(config: DataConfig) -> None:
    """Raise InputError for values that no data set can have."""
    check_fields(config, "data")
    if "@" in config.endpoint:  # it would stand in config.yaml
        raise InputError("data.endpoint holds a user or a password: give them as AWS_ACCESS_KEY_ID and so on")


def image_shape(config: DataConfig, manifest: Manifest) -> tuple[int, ...]:
    """Of what training sees. Raises InputError where the images have no such windows."""
    if not config.crop:
        return manifest.shape
    if manifest.kind != "image" or config.crop > min(manifest.shape[1:]):
        raise InputError(f"data.crop={config.crop} is more than there is of {manifest.name} {manifest.shape}")
    return manifest.shape[0], config.crop, config.crop


def open_reader(config: DataConfig, manifest: Manifest) -> Reader:
    """A reader of one split, through the cache if one is set and the data lie elsewhere."""
    store = open_store(config.path)
    if config.cache and config.path.startswith("s3://"):
        store = cast(Store, CachedStore(store, manifest, config.cache, int(config.cache_gb * 1e9)))
    shards = manifest.split(config.split).shards
    return Reader(store, manifest, shards, check=config.check, skip=config.broken == "skip")
