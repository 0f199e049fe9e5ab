"""One sample in a shard: its bytes, what they decode to, and reading them in the order of the tar."""

import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.errors import InputError

Array = npt.NDArray[Any]

SUFFIXES = {"image": ("png", "jpg", "jpeg"), "point": ("npy",)}
"""Which members of a sample hold its array, by the data set's kind."""

UNDECODABLE = (OSError, InputError)
"""What reading a picture file raises (OSError), and decoding it (InputError, see `decoding`)."""

BROKEN_TAR = (
    *(tarfile.TarError, EOFError, RecursionError, MemoryError),  # headers that nest or lie
    *(zlib.error, lzma.LZMAError, gzip.BadGzipFile),  # a tar may be compressed
)
"""What reading a damaged tar raises. A disk or network that fails raises others, worth a retry."""


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


@contextmanager
def decoding() -> Iterator[None]:
    """Turn what a decoder raises for bytes in memory that it cannot read into an InputError that says why, not where.

    For damaged bytes Pillow and NumPy raise nearly anything: SyntaxError, struct.error, MemoryError, OverflowError, ...
    """
    try:
        yield
    except UnidentifiedImageError:  # its text is the address of a stream
        raise InputError("no picture that Pillow can read") from None
    except Exception as error:
        raise InputError(str(error) or type(error).__name__) from None


def eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in mode `L` or `RGB`: 16-bit grey is scaled by 1/257 (Pillow would clip it), transparency is on white.

    Raises InputError for values of no known range, and what Pillow raises.
    """
    if picture.mode == "F":
        raise InputError("mode F, floating-point pixels of no known range: save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # I;16, I;16B, I;16L or, of 32 bits, I
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"mode {picture.mode}, pixels beyond 16 bits: save it with 8 or 16 bits")
        picture = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert(mode)


def decode_image(data: bytes) -> Array:
    """The pixels (C, H, W) uint8 of a picture file, C being 1 for grey, else 3. Raises InputError where it is none."""
    with decoding(), Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(eight_bits(picture, "L" if picture.mode == "L" else "RGB"))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_point(data: bytes, shape: tuple[int, ...]) -> Array:
    """The finite values (D,) float32 of an .npy file, whose header must say `shape` before memory is taken.

    Raises InputError for anything else.
    """
    with decoding():
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, _, dtype = read(stream)
        if found != shape or dtype != np.float32:
            raise InputError(f"{dtype} of shape {found}, but index.json says float32 of {shape}")
        array: Array = np.load(io.BytesIO(data), allow_pickle=False)
        if not np.isfinite(array).all():
            raise InputError("a value is not finite")
    return array


def decode(sample: dict[str, Any], kind: str, shape: tuple[int, ...], classes: int, shard: str) -> tuple[Array, int]:
    """A sample's array (uint8 of an image, float32 of a point) and its label, -1 if it has none.

    Raises InputError that names the shard and the key where the array is missing, cannot be decoded, has another shape
    or values that are not finite, or the label is not one of the data set's.
    """
    where = f"{shard}, key {sample['__key__']}"
    suffix = next((suffix for suffix in SUFFIXES[kind] if suffix in sample), None)
    if suffix is None:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES[kind])}: repack the data set")
    try:
        array = decode_image(sample[suffix]) if kind == "image" else decode_point(sample[suffix], shape)
    except InputError as error:
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): repack the data set") from None
    if array.shape != shape:
        raise InputError(f"{where}: an image of shape {array.shape}, but index.json says {shape}: repack the data set")
    if "cls" not in sample:
        return array, -1
    text = sample["cls"].decode("ascii", errors="replace").strip()
    label = int(text) if text.isdecimal() and len(text) < 19 else -1  # 19 digits may be more than an int64
    if label < 0 or (classes and label >= classes):
        raise InputError(f"{where}: label {text[:20]!r} is none of the {classes} in index.json: repack the data set")
    return array, label


def read_samples(stream: BinaryIO, shard: str) -> Iterator[dict[str, Any]]:
    """The samples of one tar in order, as WebDataset gives them: `__key__` and the bytes by suffix.

    Raises InputError where the bytes are no tar or end early. A tar cut exactly between two samples looks complete,
    so whoever reads to the end must compare the count with the manifest.
    """
    try:
        yield from group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))
    except BROKEN_TAR as error:
        why = _reason(error)
        raise InputError(f"{shard}: truncated or no tar ({why}): copy it again, or repack the data set") from None
    except ValueError as error:  # from group_by_keys
        raise InputError(f"{shard}: {_reason(error)}: repack the data set") from None


def _reason(error: Exception) -> str:
    """What an error said before WebDataset added the stream and its address to it."""
    first = error.args[0]
    return first.partition(" @ <")[0] if isinstance(first, str) else type(error).__name__
