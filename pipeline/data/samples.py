"""One sample in a shard: its bytes, what they decode to, and reading them in the order of the tar."""

import io
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.errors import InputError

Array = npt.NDArray[Any]

SUFFIXES = {"image": ("png", "jpg", "jpeg"), "point": ("npy",)}
"""Which members of a sample hold its array, by the data set's kind."""

UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow and NumPy raise for bytes that they cannot read (Pillow: SyntaxError for a broken PNG chunk)."""


def scaled(data: Tensor) -> Tensor:
    """Stored images (uint8) in the model's scale: float32 in [-1, 1]; points as they are."""
    return data.float().div_(127.5).sub_(1.0) if data.dtype == torch.uint8 else data.float()


def encode(array: Array, suffix: str) -> bytes:
    """The bytes of an image (C, H, W) uint8, C being 1 or 3, as `png` or `jpg`; or of a point (D,) float32 as `npy`."""
    stream = io.BytesIO()
    if suffix == "npy":
        np.save(stream, array)
    else:
        image = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
        image.save(stream, format="PNG") if suffix == "png" else image.save(stream, format="JPEG", quality=95)
    return stream.getvalue()


def decode_image(data: bytes | BinaryIO, channels: int | None = None) -> Array:
    """The pixels (C, H, W) uint8 of a picture file. `channels` converts grey and colour (1 or 3); None keeps them.

    Raises OSError, SyntaxError, ValueError, EOFError or Pillow's DecompressionBombError where it is none.
    """
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
        keep = channels is None and picture.mode in ("L", "RGB")
        pixels = np.asarray(picture if keep else picture.convert("L" if channels == 1 else "RGB"))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode(sample: dict[str, Any], kind: str, shape: tuple[int, ...], classes: int, shard: str) -> tuple[Array, int]:
    """A sample's array (uint8 of an image, float32 of a point) and its label, -1 if it has none.

    Raises InputError that names the shard and the key where the array is missing, cannot be decoded or has another
    shape, or the label is not one of the data set's.
    """
    where = f"{shard}, key {sample['__key__']}"
    suffix = next((suffix for suffix in SUFFIXES[kind] if suffix in sample), None)
    if suffix is None:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES[kind])}: repack the data set")
    try:
        if kind == "image":
            array = decode_image(sample[suffix])
        else:
            array = np.load(io.BytesIO(sample[suffix]), allow_pickle=False)
    except UNDECODABLE as error:
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): repack the data set") from None
    if array.shape != shape or array.dtype != (np.uint8 if kind == "image" else np.float32):
        raise InputError(
            f"{where}: {array.dtype} of shape {array.shape}, but index.json says {shape}: repack the data set"
        )
    if "cls" not in sample:
        return array, -1
    text = sample["cls"].decode("ascii", errors="replace").strip()
    if not text.isdecimal() or (classes and int(text) >= classes):
        raise InputError(f"{where}: label {text!r} is none of the {classes} in index.json: repack the data set")
    return array, int(text)


def read_samples(stream: BinaryIO, shard: str) -> Iterator[dict[str, Any]]:
    """The samples of one tar in order, as WebDataset gives them: `__key__` and the bytes by suffix.

    Raises InputError where the bytes are no tar or end early. A tar cut exactly between two samples looks complete,
    so whoever reads to the end must compare the count with the manifest.
    """
    try:
        yield from group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{shard}: truncated or no tar ({error}): copy it again, or repack the data set") from None
    except ValueError as error:  # from group_by_keys
        raise InputError(f"{shard}: {error.args[0]}: repack the data set") from None
