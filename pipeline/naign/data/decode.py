"""The bytes of pictures and arrays, and the pixels and values that they decode to."""

import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from naign.errors import InputError, Unavailable

Array = npt.NDArray[Any]
JpegHeader = tuple[int, int, int, int]  # channels, height, width, orientation: EXIF's number, from 1, upright, to 8

JPEG_PIXELS = 1 << 26  # above it Pillow's own guard against pictures that are made to fill the memory decides
PLAIN_PIXELS = 256 * 256  # above it the time is in decompression
PLAIN_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB"}  # by bit depth, colour type, and three zeros

_parsing = threading.Lock()
"""Held while NumPy parses a header: Python's own parser, which it calls, fails in two threads at once (gh-106905)."""


def encode(array: Array, suffix: str) -> bytes:
    """The bytes of an image (C, H, W) uint8 as png, webp (both exact), jpg or npy; of a point (D,) float32 as npy."""
    stream = io.BytesIO()
    if suffix == "npy":
        np.save(stream, array)
        return stream.getvalue()
    image = to_picture(array)
    if suffix == "jpg":
        image.save(stream, "JPEG", quality=95)
    elif suffix == "webp":
        image.save(stream, "WEBP", lossless=True)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()


def to_picture(pixels: Array) -> Image.Image:
    """The picture of pixels (C, H, W) uint8, C being 1 or 3."""
    if len(pixels) == 1:
        return Image.fromarray(np.ascontiguousarray(pixels[0]))
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def to_pixels(picture: Image.Image) -> Array:
    """The pixels (C, H, W) uint8 of a picture in mode L or RGB."""
    pixels = np.asarray(picture)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


@contextmanager
def decoding() -> Iterator[None]:
    """Turn any error of a decoder for bytes in memory into an InputError that says why, not where. Unavailable where
    the memory does not suffice.
    """
    try:
        yield
    except MemoryError:
        raise Unavailable("too little memory to decode a picture: free some") from None
    except UnidentifiedImageError:  # its text is the address of a stream
        raise InputError("not a picture that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"too large a picture, cut or reduce it first: {error}") from None
    except Exception as error:  # for damaged bytes Pillow and NumPy raise nearly anything
        raise InputError(str(error) or type(error).__name__) from None


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """All that Pillow reads, the usual ones first, but EPS, for which it starts another program, Ghostscript."""
    Image.init()
    return sorted((name for name in Image.ID if name != "EPS"), key=lambda name: name not in ("PNG", "JPEG", "WEBP"))


def _open_picture(data: bytes) -> Image.Image:
    """A picture in any of these formats, not decoded yet. Raises what Pillow raises; InputError for mode F."""
    picture = Image.open(io.BytesIO(data), formats=_formats())
    if picture.mode == "F":
        raise InputError("mode F, floating-point pixels of no known range: save it with 8 or 16 bits")
    return picture


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in mode `L` or `RGB`: 16-bit grey is scaled by 1/257 (Pillow would clip it), transparency is on white.
    Raises InputError for values beyond 16 bits, and what Pillow raises.
    """
    if picture.mode.startswith("I"):  # I;16, I;16B, I;16L or, of 32 bits, I
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"mode {picture.mode}, pixels beyond 16 bits: save it with 8 or 16 bits")
        picture = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if picture.mode == mode:
        return picture  # convert would copy it
    return picture.convert(mode)


def decode_image(data: bytes, into: Array | None = None) -> Array:
    """The pixels (C, H, W) uint8 of an image file, upright, C being 1 for grey, else 3. Of several frames the first.

    Of the shape of `into` they may be written there, and `into` is returned. InputError for bytes of no picture.
    """
    header = jpeg_header(data)
    plain = decode_jpeg(data, header, into=into) if header else _decode_plain_png(data)
    if plain is not None:
        return plain
    picture = decode_picture(data)
    with decoding():
        return to_pixels(in_mode(picture, "L" if picture.mode == "L" else "RGB"))


def decode_picture(data: bytes) -> Image.Image:
    """The picture of an image file as Pillow has it, with its mode and profile, decoded and upright. Of several frames
    the first. InputError for bytes of no picture, or for one of more pixels than Pillow decodes.
    """
    with decoding():
        picture = _open_picture(data)
        picture.load()
        if _orientation(picture) == 1:
            return picture
        return ImageOps.exif_transpose(picture)  # raises for damaged EXIF


def header_shape(data: bytes) -> tuple[int, int, int]:
    """Channels, height and width of what decode_image gives, from the header alone; InputError for no picture."""
    with decoding(), _open_picture(data) as picture:
        width, height = picture.size
        channels = 1 if picture.mode == "L" else 3
        if _orientation(picture) >= 5:
            return channels, width, height
        return channels, height, width


def _decode_plain_png(data: bytes) -> Array | None:
    """The pixels of a PNG of 8-bit grey or colour whose data is one chunk; None for any other, which is left to Pillow.
    Not parsing the chunks saves a quarter of the time that reading MNIST takes.
    """
    if data[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" or data[37:41] != b"IDAT" or data[-8:-4] != b"IEND":
        return None
    mode = PLAIN_MODES.get(data[24:29])
    width = int.from_bytes(data[16:20])
    height = int.from_bytes(data[20:24])
    end = 41 + int.from_bytes(data[33:37])
    if mode is None or len(data) != end + 16 or not 0 < width * height <= PLAIN_PIXELS:
        return None
    try:
        return to_pixels(Image.frombytes(mode, (width, height), data[41:end], "zip", mode, 0))
    except (ValueError, OSError):
        return None


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG in grey or YCbCr; None for any other, which is left to Pillow. Raises InputError."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError for a subsampling that simplejpeg does not know
        return None
    if space not in ("Gray", "YCbCr") or height * width > JPEG_PIXELS:
        return None
    orientation = 1
    if b"\xff\xe1" in data:  # EXIF, or XMP that may say it; among pixels these bytes do not occur
        with decoding(), _open_picture(data) as picture:
            orientation = _orientation(picture)
    return 1 if space == "Gray" else 3, height, width, orientation


def decode_jpeg(
    data: bytes,
    header: JpegHeader,
    factor: int = 1,
    *,
    into: Array | None = None,
) -> Array | None:
    """The upright pixels (C, H, W) of a sound JPEG with that header, at 1/factor of its size; None: left to Pillow.

    Of an upright picture they are written to `into`, and it is returned, if it has their shape and order in memory.
    Pillow has the same pixels by the same library, libjpeg-turbo, but takes five times as long for small images.
    """
    channels, height, width, orientation = header
    options: dict[str, Any] = {"colorspace": "GRAY" if channels == 1 else "RGB", "strict": True}
    if factor > 1:
        height = -(-height // factor)
        width = -(-width // factor)
        options |= {"min_height": height, "min_width": width, "min_factor": factor}
    if into is not None and into.shape == (channels, height, width) and orientation == 1:
        memory = into.transpose(1, 2, 0)
        if memory.flags.c_contiguous:
            options["buffer"] = memory
    try:
        pixels: Array = simplejpeg.decode_jpeg(data, **options)
    except (ValueError, KeyError):
        return None
    if "buffer" in options:
        return into
    if pixels.shape[:2] != (height, width):
        return None
    return _turned(pixels.transpose(2, 0, 1), orientation)


def _orientation(picture: Image.Image) -> int:
    """EXIF's number for how a picture lies: 1 where it says nothing that can be read, as viewers have it."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # for damaged EXIF Pillow raises nearly anything
        return 1
    if orientation not in range(1, 9):
        return 1
    return int(orientation)


def _turned(pixels: Array, orientation: int) -> Array:
    """A view of pixels (C, H, W), upright, that lie as EXIF's number says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return pixels


def decode_array(data: bytes, shape: tuple[int, ...], dtype: str) -> Array:
    """Finite values of an .npy file with `dtype` and `shape` (0: any length; 1 channel does for 3), else InputError."""
    array = read_npy(data)
    if array.shape == shape and array.dtype == dtype:
        return array
    is_grey = len(shape) == 3 and shape[0] == 3 and fits(array.shape, (1, *shape[1:]))
    if array.dtype != dtype or not (is_grey or fits(array.shape, shape)):
        raise InputError(f"{array.dtype} of shape {array.shape}, but index.json says {dtype} of {shape}")
    return array


def read_npy(data: bytes) -> Array:
    """The finite values of an .npy file. InputError for other bytes, and where there are no values."""
    with decoding():
        length = 10 + int.from_bytes(data[8:10], "little")
        if data[6:7] == b"\2":  # format 2.0
            length = 12 + int.from_bytes(data[8:12], "little")
        shape, by_columns, dtype = _parse_npy(data[:length])
        if 0 in shape:
            raise InputError(f"no values, its shape is {shape}")
        values: Array = np.frombuffer(data, dtype, math.prod(shape), length)
        array = values.reshape(shape, order="F" if by_columns else "C").copy()
        if not np.isfinite(array).all():
            raise InputError("a value is not finite")
        return array


@lru_cache(maxsize=256)
def _parse_npy(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether by columns, and type in the header of an .npy file. Raises what NumPy raises."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with _parsing:
        return read(stream)


def fits(shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether a sample's shape is that of a data set, where 0 stands for a length that varies."""
    return len(shape) == len(stored) and all(b in (0, a) for a, b in zip(shape, stored, strict=True))


@lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...], dtype: npt.DTypeLike) -> bytes:
    """The header that NumPy writes before such an array."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()
