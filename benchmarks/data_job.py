"""What a contender of data.py is given, and what it gives back."""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Record = dict[str, Any]
Item = tuple[int, int, npt.NDArray[np.uint8] | None]
"""Images and bytes, the bytes where the contender itself counts them, and the decoded pixels of those images."""
Read = Callable[[], Iterator[Item]]


@dataclass(kw_only=True, slots=True, frozen=True)
class Job:
    """What to read."""

    path: str
    """Folder or s3://bucket of the tars, or of what a peer has made of them."""
    local: str
    """The same tars in a folder."""
    shards: tuple[str, ...]
    bytes: int
    """Of what `path` holds."""
    images: int
    round: int
    """Images at once, for ours; it divides the images."""
    suffix: str
    """png or jpg."""
    grey: bool
    workers: int = 0
    """Decoding threads of ours, or processes of `decode, parts`."""
    summed: bool = False
    """Also give the sum of all pixels, which takes time."""
    aws: str = "aws"
    """The program, for pipes."""


def tar_samples(job: Job) -> Iterator[tuple[bytes, int]]:
    """Encoded image and label of every sample, in the order of the shards."""
    for shard in job.shards:
        with tarfile.open(Path(job.local) / shard) as tar:
            label = -1
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                if member.name.endswith(".cls"):  # the members of a sample come in alphabetical order
                    label = int(stream.read())
                else:
                    yield stream.read(), label
