"""The bytes of pictures and arrays, and the pixels and values that they decode to."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from naign.errors import InputError, Unavailable

Array = npt.NDArray[Any]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")
"""What is read. Pillow reads more, and would start another program, Ghostscript, for EPS."""
PLAIN_PIXELS = 256 * 256  # above it the time is in decompression
PLAIN_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB"}  # by bit depth, colour type, and three zeros
NPY = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '([<>|]\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *} *\n",
    re.DOTALL,
)
"""The header of an .npy file of numbers: type, whether by columns, shape. NumPy's parser takes 20 times as long, and
it may fail in two threads at once (gh-106905)."""
JPEG_PIXELS = 1 << 26  # above it Pillow's own guard against pictures that are made to fill the memory decides


def encode(array: Array, suffix: str) -> bytes:
    """The bytes of an image (C, H, W) uint8 as png, jpg or npy; of a point (D,) float32 as npy."""
    stream = io.BytesIO()
    if suffix == "npy":
        np.save(stream, array)
    elif suffix == "jpg":
        to_picture(array).save(stream, "JPEG", quality=95)
    else:
        to_picture(array).save(stream, "PNG")
    return stream.getvalue()


def to_picture(pixels: Array) -> Image.Image:
    """The picture of pixels (C, H, W) uint8, C being 1 or 3."""
    if len(pixels) == 1:
        return Image.fromarray(pixels[0])
    return Image.fromarray(pixels.transpose(1, 2, 0))


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


def _open_picture(data: bytes) -> Image.Image:
    """A picture in one of FORMATS, not decoded yet. Raises what Pillow raises; InputError for mode F."""
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
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


def decode_image(data: bytes) -> Array:
    """The pixels (C, H, W) uint8 of an image file, upright, C being 1 for grey, else 3. Of several frames the first.
    InputError for bytes of no picture.
    """
    shape = jpeg_shape(data)
    if shape:
        plain = decode_jpeg(data, shape)
    else:
        plain = _decode_plain_png(data)
    if plain is not None:
        return plain
    picture = decode_picture(data)
    mode = "L" if picture.mode == "L" else "RGB"
    with decoding():
        return to_pixels(in_mode(picture, mode))


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
    Not parsing the chunks halves the time that reading MNIST takes.
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
        picture = Image.frombytes(mode, (width, height), data[41:end], "zip", mode, 0)
    except (ValueError, OSError):
        return None
    return to_pixels(picture)


def jpeg_shape(data: bytes) -> tuple[int, int, int] | None:
    """Channels, height and width of an upright JPEG in grey or YCbCr; None for any other picture, which is left to
    Pillow. Raises InputError.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError for a subsampling that simplejpeg does not know
        return None
    if space not in ("Gray", "YCbCr") or height * width > JPEG_PIXELS:
        return None
    if b"\xff\xe1" in data:  # EXIF, or XMP that may say how it lies; among pixels these bytes do not occur
        with decoding(), _open_picture(data) as picture:
            if _orientation(picture) != 1:
                return None
    channels = 1 if space == "Gray" else 3
    return channels, height, width


def decode_jpeg(
    data: bytes,
    shape: tuple[int, int, int],
    factor: int = 1,
) -> Array | None:
    """The pixels (C, H, W) of a sound JPEG of that shape, at 1/factor of its size; None: left to Pillow.

    Pillow has the same pixels by the same library, libjpeg-turbo, but takes five times as long for small images.
    """
    channels, height, width = shape
    height = -(-height // factor)
    width = -(-width // factor)
    colours = "GRAY" if channels == 1 else "RGB"
    options: dict[str, Any] = {"colorspace": colours, "strict": True}
    if factor > 1:
        options |= {"min_height": height, "min_width": width, "min_factor": factor}
    try:
        pixels: Array = simplejpeg.decode_jpeg(data, **options)
    except (ValueError, KeyError):
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return pixels.transpose(2, 0, 1)


def _orientation(picture: Image.Image) -> int:
    """EXIF's number for how a picture lies: 1 where it says nothing that can be read, as viewers have it."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # for damaged EXIF Pillow raises nearly anything
        return 1
    if orientation not in range(1, 9):
        return 1
    return int(orientation)


def read_npy(data: bytes) -> Array:
    """The finite values of an .npy file. InputError for other bytes, and where there are no values."""
    header = NPY.match(data)
    if not header:
        raise InputError("not an .npy file of numbers")
    with decoding():
        shape = tuple(map(int, re.findall(rb"\d+", header[3])))
        if 0 in shape:
            raise InputError(f"no values, its shape is {shape}")
        values = np.frombuffer(
            data,
            dtype=header[1].decode(),
            count=math.prod(shape),
            offset=header.end(),
        )
        order = "F" if header[2] == b"True" else "C"
        array: Array = values.reshape(shape, order=order).copy()  # type: ignore[call-overload]
        if not np.isfinite(array).all():
            raise InputError("a value is not finite")
        return array


def fits(shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether a sample's shape is that of a data set, where 0 stands for a length that varies."""
    if len(shape) != len(stored):
        return False
    return all(known in (0, length) for length, known in zip(shape, stored, strict=True))
