"""One sample of a shard: its members' bytes by suffix, and the array and label that they are."""

from typing import Any

import numpy as np
import numpy.typing as npt

from naign.data.decode import Array, decode_image, fits, read_npy
from naign.data.format.labels import label_text, parse_number
from naign.data.format.manifest import INDEX, Manifest
from naign.data.order import philox
from naign.data.resize import Resize, channels, resized, resized_array
from naign.errors import InputError

SUFFIXES = {"image": ("png", "jpg", "jpeg", "webp", "npy"), "point": ("npy",)}
"""Of the member that holds an array, by kind."""
REPACK = "repack the data set"

Numbers = npt.NDArray[np.float64]
DRAWN = 4  # random numbers of a row: for its window's top and left edge, and for mirroring; Philox counts in fours


def find_suffix(
    sample: dict[str, Any],
    kind: str,
    where: str,
    remedy: str,
) -> str:
    """The suffix of the member that holds the array. Raises InputError, with the remedy, where there is none."""
    for suffix in SUFFIXES[kind]:
        if suffix in sample:
            return suffix
    raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES[kind])}: {remedy}")


def decode(
    sample: dict[str, Any],
    manifest: Manifest,
    shard: str,  # for messages
    resize: Resize,
    drawn: Numbers | None,  # a row of row_numbers; None: the central window
) -> tuple[Array, int]:
    """A sample's array (uint8 of an image, float32 of a point), and label, -1 if none. InputError, which names shard
    and key, where one is not as the manifest says, or cannot be decoded.
    """
    where = f"{shard}, key {sample['__key__']}"
    suffix = find_suffix(sample, manifest.kind, where, REPACK)
    data = sample[suffix]
    try:
        if suffix == "npy":
            array = read_npy(data)
            if resize.height and array.ndim == 3:
                array = resized_array(array, resize)
        elif resize.height:
            array = resized(data, resize)
        else:
            array = decode_image(data)
    except InputError as error:
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): {REPACK}") from None
    shape = manifest.shape
    if len(array) == 1 and shape[0] == 3:
        array = channels(array, 3)
    if resize.height:
        shape = resize.shape(shape, where)
    if array.dtype != manifest.dtype or not fits(array.shape, shape):
        found = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{where}: {found}, but {INDEX} says {manifest.dtype} of {manifest.shape}: {REPACK}")
    if resize.crop:
        array = crop(array, resize.crop, drawn, f"{where}: ")
    return array, _label(sample, manifest, where)


def _label(sample: dict[str, Any], manifest: Manifest, where: str) -> int:
    """The number of a sample's label, -1 without one. Raises InputError for a label that the data set does not have."""
    text = label_text(sample, manifest.label, where)
    if text is None:
        return -1
    classes = len(manifest.labels)
    if manifest.label:
        number = manifest.numbers.get(text, -1)
    else:
        number = parse_number(text)
    if number < 0 or (classes and number >= classes):
        raise InputError(f"{where}: label {text[:20]!r} is none of the {classes} in {INDEX}: {REPACK}")
    return number


def row_numbers(
    seed: int,
    round: int,
    first: int,
    last: int,
) -> Numbers:
    """Uniform numbers (rows, DRAWN) in [0, 1) for rows [first, last) of a round.

    They are Philox's, counted by row, so that those of any rows can be drawn alone. No order of shards has the same
    stream.
    """
    raw: Any = philox(seed, round + 2**63, first).random_raw(DRAWN * (last - first))
    numbers: Numbers = (raw >> np.uint64(11)) * 2.0**-53
    return numbers.reshape(-1, DRAWN)


def crop(
    image: Array,
    size: int,
    drawn: Numbers | None = None,
    where: str = "",
) -> Array:
    """A window (C, size, size) of an image (C, H, W), None: the central one. InputError where the image is smaller."""
    _, height, width = image.shape
    if size > min(height, width):
        raise InputError(f"{where}{width}x{height} is less than data.crop={size}")
    down = 0.5
    right = 0.5
    if drawn is not None:
        down, right = drawn[:2].tolist()
    top = int(down * (height - size + 1))
    left = int(right * (width - size + 1))
    return image[:, top : top + size, left : left + size]
