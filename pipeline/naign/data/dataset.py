"""The settings of what is trained on."""

from dataclasses import dataclass, field

from naign.data.resize import Resize, parse_size
from naign.errors import InputError
from naign.settings.constraints import AT_LEAST_0, FREE, MAY_CHANGE, NOT_EMPTY, between, check_fields, one_of


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: str = field(default="data/mnist", metadata=MAY_CHANGE | NOT_EMPTY)
    """Folder or s3://bucket/prefix of shards with their index.json (`naign pack` or `naign index` makes it)."""
    index: str = field(default="", metadata=MAY_CHANGE)
    """Folder or s3://bucket/prefix of index.json and page tables, if they are not beside the shards (`naign index
    --to`). Empty: beside them."""
    source: str = field(default="", metadata=FREE)
    """Data set to pack at `path` if nothing is there, as for `naign pack`. Empty: none; mnist at the default path."""
    split: str = "train"
    """Which split to train on."""
    workers: int = field(default=0, metadata=FREE | between(0, 1024))
    """Threads per rank that read and decode. 0: one, or two on a GPU. Decoding releases the interpreter's lock, so more
    threads help, most with large images."""
    shuffle: int = field(default=0, metadata=AT_LEAST_0)
    """Number of places in the data set that rounds draw from in turn; 1: shards one after the other. 0: 1 for data of
    `naign pack`, whose shards are random subsets, and 128 for tars by others."""
    flip: bool = False
    """Mirror each image with probability 1/2."""
    crop: int = field(default=0, metadata=AT_LEAST_0)
    """Train on random windows of this many pixels a side, not resized; 0: on whole images."""
    size: str = ""
    """Resize the largest central window of pictures to so many pixels a side (64), or height x width (48x64). Empty: as
    stored, in one size."""
    broken: str = field(default="error", metadata=FREE | one_of(("error", "skip")))
    """A sample that cannot be decoded: error stops the run; skip logs it and takes the shard's next one instead, up to
    1 % of the samples."""
    trace: str = field(default="", metadata=FREE)
    """Folder in which every rank lists `epoch round key` of each image it trains on; empty: no list."""


def check_config(config: DataConfig) -> None:
    """Raise InputError for values that no data set can have."""
    check_fields(config, "data")
    parse_resize(config)


def parse_resize(config: DataConfig) -> Resize:
    """The resizing that the settings describe. Raises InputError if they contradict each other."""
    if not config.size:
        return Resize(crop=config.crop)
    if config.crop:
        raise InputError("data.crop takes windows of images as they are stored, data.size resizes them: choose one")
    height, width = parse_size(config.size, "data.size")
    return Resize(height=height, width=width)
