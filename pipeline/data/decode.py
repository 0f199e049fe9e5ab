"""One sample in a shard: its bytes, and what they decode to."""

import io
import math
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.data.format.manifest import FORMS
from pipeline.errors import InputError

Array = npt.NDArray[Any]

SUFFIXES = {"image": ("png", "jpg", "jpeg", "webp", "npy"), "point": ("npy",)}  # of an array's member, by kind

UNDECODABLE = (OSError, InputError)
"""What reading a picture file raises (OSError), and decoding it (InputError, see `decoding`)."""


def scaled(data: Tensor) -> Tensor:
    """Stored images (uint8) in the model's scale: float32 in [-1, 1]; points as they are."""
    values = data.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(127.5).sub_(1.0) if data.dtype == torch.uint8 else values


def encode(array: Array, suffix: str) -> bytes:
    """The bytes of an image (C, H, W) uint8, C being 1 or 3, as `png`, `webp` (both exact), `jpg` or `npy`; or of a
    point (D,) float32 as `npy`.
    """
    stream = io.BytesIO()
    if suffix == "npy":
        np.save(stream, array)
        return stream.getvalue()
    image = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    options: dict[str, Any] = {"jpg": {"format": "JPEG", "quality": 95}, "webp": {"format": "WEBP", "lossless": True}}
    image.save(stream, **options.get(suffix, {"format": "PNG"}))
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
    return picture if picture.mode == mode else picture.convert(mode)  # which would copy


def decode_image(data: bytes, into: Array | None = None) -> Array:
    """The pixels (C, H, W) uint8 of an image file, C being 1 for grey, else 3. Raises InputError if it is none.

    If `into` has the image's shape, the pixels may be written there: then `into` itself is returned. In memory the
    channels of a pixel lie together, as decoders give them.
    """
    plain = _decode_plain_jpeg(data, into) if data[:2] == b"\xff\xd8" else _decode_plain_png(data)
    if plain is not None:
        return plain
    with decoding(), Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(eight_bits(picture, "L" if picture.mode == "L" else "RGB"))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _decode_plain_png(data: bytes) -> Array | None:
    """The pixels of a PNG of 8-bit grey or colour whose data is one chunk; None for any other, which is left to Pillow.

    Pillow decompresses here too, but does not parse the chunks, which takes longer than a small image: with Pillow
    alone reading MNIST takes a third more processor time.
    """
    if data[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or data[37:41] != b"IDAT" or data[-8:-4] != b"IEND":
        return None
    mode = _MODES.get(data[24:29])
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    end = 41 + int.from_bytes(data[33:37])
    if mode is None or len(data) != end + 16 or not 0 < width * height <= PLAIN_PIXELS:
        return None
    for first, last in ((12, 29), (37, end)):  # of each chunk but its length and its checksum
        if zlib.crc32(data[first:last]) != int.from_bytes(data[last : last + 4]):
            return None
    try:
        picture = Image.frombytes(mode, (width, height), data[41:end], "zip", mode, 0)
    except (ValueError, OSError):
        return None
    pixels = np.frombuffer(picture.tobytes(), np.uint8)
    if mode == "L":
        return pixels.reshape(1, height, width)
    return pixels.reshape(height, width, 3).transpose(2, 0, 1)


def _decode_plain_jpeg(data: bytes, into: Array | None) -> Array | None:
    """The pixels of a sound JPEG in grey or YCbCr; None for any other, which is left to Pillow.

    simplejpeg and Pillow use the same library, libjpeg-turbo, and give the same pixels. simplejpeg parses no markers in
    Python and copies nothing: for small images it takes a fifth of the time.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("Gray", "YCbCr") or height * width > JPEG_PIXELS:
            return None
        kind, channels = ("GRAY", 1) if space == "Gray" else ("RGB", 3)
        memory = into.transpose(1, 2, 0) if into is not None and into.shape == (channels, height, width) else None
        if memory is not None and memory.flags.c_contiguous:
            simplejpeg.decode_jpeg(data, kind, strict=True, buffer=memory)
            return into
        pixels: Array = simplejpeg.decode_jpeg(data, kind, strict=True)
    except (ValueError, KeyError):  # KeyError for a subsampling that it does not know
        return None
    return pixels.transpose(2, 0, 1)


JPEG_PIXELS = 1 << 26  # above it Pillow's own guard against pictures that are made to fill the memory decides
PLAIN_PIXELS = 256 * 256  # above it the time is in decompression
_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB"}  # by bit depth, colour type, and three zeros


def decode_array(data: bytes, shape: tuple[int, ...], dtype: str) -> Array:
    """The finite values of an .npy file, whose header must say `shape` and `dtype` before memory is taken.

    Raises InputError for anything else.
    """
    header, by_columns = npy_header(shape, dtype), False
    with decoding():
        if not data.startswith(header):
            with _PARSING:
                stream = io.BytesIO(data)
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                found, by_columns, kind = read(stream)
            if found != shape or kind != np.dtype(dtype):
                raise InputError(f"{kind} of shape {found}, but index.json says {dtype} of {shape}")
            header = data[: stream.tell()]
        flat: Array = np.frombuffer(data, dtype, math.prod(shape), len(header))
        array = flat.reshape(shape, order="F" if by_columns else "C").copy()
        if not np.isfinite(array).all():
            raise InputError("a value is not finite")
        return array


_PARSING = threading.Lock()
"""Held while NumPy parses a header: Python's own parser, which it calls, fails in two threads at once (gh-106905)."""


@lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...], dtype: npt.DTypeLike) -> bytes:
    """The header that NumPy writes before such an array."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def decode(
    sample: dict[str, Any], kind: str, shape: tuple[int, ...], classes: int, shard: str, into: Array | None = None
) -> tuple[Array, int]:
    """A sample's array (uint8 of an image, float32 of a point; in `into` if that saves a copy), and label, -1 if none.

    Raises InputError that names the shard and the key where the array is missing, cannot be decoded, has another shape
    or values that are not finite, or the label is not one of the data set's.
    """
    where = f"{shard}, key {sample['__key__']}"
    suffix = next((suffix for suffix in SUFFIXES[kind] if suffix in sample), None)
    if suffix is None:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES[kind])}: repack the data set")
    try:
        if suffix == "npy":
            array = decode_array(sample[suffix], shape, FORMS[kind][0])
        else:
            array = decode_image(sample[suffix], into)
            if len(array) == 1 and shape[0] == 3:
                array = np.repeat(array, 3, axis=0)
            elif len(array) == 3 and shape[0] == 1 and suffix == "webp" and (array == array[:1]).all():
                array = array[:1]  # WebP has no grey
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


Draws = npt.NDArray[np.float64]  # (rows, 4), uniform in [0, 1)


def draws(seed: int, round: int, first: int, last: int) -> Draws:
    """The random numbers of rows [first, last) of a round: Philox counted by row, so that any part is drawn alone."""
    key = np.array([seed % 2**64, round + 2**63], np.uint64)  # apart from the keys that order shards
    raw: Any = np.random.Philox(key=key, counter=[first, 0, 0, 0]).random_raw(4 * (last - first))
    uniform: Draws = (raw >> np.uint64(11)).reshape(-1, 4) * 2.0**-53
    return uniform


def central(rows: int) -> Draws:
    """Draws that take the central window and mirror nothing."""
    return np.full((rows, 4), 0.5)


def crop(image: Array, size: int, drawn: npt.NDArray[np.float64]) -> Array:
    """A window (C, size, size) of an image (C, H, W)."""
    _, height, width = image.shape
    top, left = int(drawn[0] * (height - size + 1)), int(drawn[1] * (width - size + 1))
    return image[:, top : top + size, left : left + size]


def flip(images: Array, drawn: Draws) -> None:
    """Mirror about half of the images (n, C, H, W), in place."""
    chosen = drawn[:, 2] < 0.5
    images[chosen] = images[chosen, ..., ::-1]
