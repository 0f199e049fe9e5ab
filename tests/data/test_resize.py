"""Pictures of any size, as others store them, brought to one size."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image, ImageOps

from naign.data.dataset import DataConfig, check_config
from naign.data.decode import decode_image, header_shape
from naign.data.format.indexing import index
from naign.data.loader import Stream
from naign.data.resize import Resize, channels, resized
from tests.data.numbered import add, take
from tests.refused import refused

PHOTOS = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
"""Two photographs of 640 x 427."""

SIZES = [
    (64, 64),
    (90, 66),
    (150, 200),
    (640, 427),
    (65, 300),
    (1000, 80),
]


def stored(picture, form="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def photo(number, size):
    """Part of a photograph, of any size."""
    rng = np.random.default_rng(number)
    whole = Image.open(PHOTOS[number % 2])
    left, top = rng.integers(0, 200, 2).tolist()
    return whole.resize(
        size,
        box=(
            left,
            top,
            left + 400,
            top + 220,
        ),
    )


def lying(
    number,
    size,
    form="JPEG",
    mode="RGB",
):
    """A photograph that lies as EXIF's number says."""
    exif = Image.Exif()
    exif[0x0112] = number
    return stored(photo(1, size).convert(mode), form, exif=exif)


def upright(data):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def difference(pixels, picture):
    """By how much pixels (C, H, W) differ from a picture, in grey levels."""
    expected = np.asarray(picture.convert("RGB")).astype(int)
    return np.abs(channels(pixels, 3).transpose(1, 2, 0) - expected)


def cut(picture, resize):
    """What Pillow makes of the window."""
    box = resize.box(*picture.size)
    size = (resize.width, resize.height)
    return picture.crop(box).resize(size, Image.Resampling.BICUBIC)


# Decoding


@pytest.mark.parametrize(
    "form, mode",
    [
        ("PNG", "RGB"),
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("TIFF", "L"),
    ],
)
def test_pictures_are_turned_upright(form, mode):
    for number in range(10):  # 0 and 9 are none of EXIF's
        data = lying(
            number,
            (24, 16),
            form,
            mode,
        )
        expected = upright(data)
        assert (5 <= number <= 8) == (expected.size == (16, 24))
        decoded = decode_image(data)
        assert len(decoded) == len(mode)
        assert not difference(decoded, expected).any()
        assert form == "TIFF" or header_shape(data) == decoded.shape
        resize = Resize(height=8, width=8)
        assert difference(resized(data, resize), cut(expected, resize)).max() <= 1


def test_orientation_is_found_in_xmp_and_not_in_damaged_exif():
    plain = stored(photo(1, (24, 16)), "JPEG")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    said = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    turned = plain[:2] + b"\xff\xe1" + (len(said) + 2).to_bytes(2) + said + plain[2:]
    assert upright(turned).size == (16, 24)
    assert decode_image(turned).shape == (3, 24, 16)
    assert header_shape(turned) == (3, 24, 16)
    damaged = stored(photo(1, (24, 16)), "JPEG", exif=b"Exif\0\0no such thing")
    assert decode_image(damaged).shape == (3, 16, 24)


def test_files_of_every_mode_come_as_pillow_shows_them():
    rgb = photo(0, (40, 30))
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize((40, 30)))
    on_white = Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha)
    grey = rgb.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [photo(1, (40, 30))]}
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    cmyk = stored(rgb.convert("CMYK"), "JPEG")
    cases = {
        "grey": (stored(grey), grey),
        "palette": (stored(palette), palette),
        "transparent": (stored(alpha), on_white),
        "16 bits": (stored(deep), grey),
        "CMYK": (cmyk, Image.open(io.BytesIO(cmyk))),
        "frames": (
            stored(
                rgb,
                "WEBP",
                lossless=True,
                **frames,
            ),
            rgb,
        ),
        "GIF": (stored(palette, "GIF", **frames), palette),
    }
    for name, (data, expected) in cases.items():
        assert not difference(decode_image(data), expected).any(), name


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("PNG", lambda data: data[:16] + (60_000).to_bytes(4, "big") * 2 + data[24:], "."),
        ("JPEG", lambda data: data[: len(data) // 2], "."),
        ("JPEG", lambda data: b"", "not a picture"),
    ],
)
def test_bombs_and_pictures_without_pixels_are_refused(form, change, message):
    data = stored(photo(0, (200, 100)), form)
    with refused(message):
        resized(change(data), Resize(height=8, width=8))


# Windows


@pytest.mark.parametrize(
    "size",
    [
        (61, 40),
        (40, 61),
        (20, 20),
        (5, 90),
        (1, 1),
        (640, 427),
    ],
)
def test_the_largest_central_window_is_taken(size):
    picture = photo(2, size)
    for width, height in ((20, 20), (20, 12)):
        resize = Resize(height=height, width=width)
        left, top, right, bottom = resize.box(*size)
        spare = 1 + resize.factor(right - left, bottom - top)  # pixels that a JPEG decoded small may lack
        wide = min(size[0], size[1] * width / height)
        high = min(size[1], size[0] * height / width)
        assert abs(right - left - wide) < spare
        assert abs(bottom - top - high) < spare
        assert abs(left + right - size[0]) <= 2 * spare
        assert abs(top + bottom - size[1]) <= 2 * spare
        pixels = resized(stored(picture), resize)
        assert difference(pixels, cut(picture, resize)).max() <= 1


@pytest.mark.parametrize("size", [16, 32, 64, 100])
def test_a_jpeg_decoded_small_is_within_a_grey_level_of_it_decoded_whole(size):
    resize = Resize(height=size, width=size)
    for path in PHOTOS:
        data = path.read_bytes()
        exact = resized(stored(Image.open(path)), resize).astype(int)
        assert np.abs(resized(data, resize) - exact).mean() < 1


# Data sets


def write(path, name, numbers):
    """Pictures of many sizes and forms with a caption and facts, as img2dataset writes them."""
    path.mkdir(exist_ok=True)
    with tarfile.open(path / name, "w") as tar:
        for number in numbers:
            form, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[number % 3]
            picture = photo(number, SIZES[number % len(SIZES)])
            if number % 5 == 0:
                picture = picture.convert("L")
            add(tar, f"{number:09d}.{suffix}", stored(picture, form))
            add(tar, f"{number:09d}.txt", b"a picture")
            add(tar, f"{number:09d}.json", b"{}")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """60 training pictures in shards of 7, 30 and 23, and 10 for testing."""
    path = tmp_path_factory.mktemp("theirs")
    for number, (first, last) in enumerate([(0, 7), (7, 37), (37, 60)]):
        write(path, f"{number:05d}.tar", range(first, last))
    write(path, "val-00000.tar", range(60, 70))
    assert index(str(path)).shape == (3, 0, 0)
    return str(path)


@pytest.mark.slow
def test_every_picture_once_and_the_same_bits_on_any_ranks_and_workers(theirs):
    settings = {"size": "24x32", "flip": True}
    plain, keys = take(
        theirs,
        6,
        each=20,
        **settings,
    )
    assert plain.shape == (120, 3, 24, 32)
    assert Counter(keys) == {f"{number:09d}": 2 for number in range(60)}
    same = 0
    for key in set(keys):
        first, second = (plain[row] for row in range(120) if keys[row] == key)
        same += torch.equal(first, second)
    assert 20 < same < 40  # mirrored in one of two epochs, or not
    for world, workers in ((2, 0), (4, 2)):
        images, others = take(
            theirs,
            6,
            world,
            each=20,
            workers=workers,
            **settings,
        )
        assert others == keys
        assert torch.equal(images, plain)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "have many sizes: say one, as with --data.size=64"),
        ({"size": "0"}, "data.size is '0': give pixels a side"),
        ({"size": "9999"}, "height x width, as 48x64, to 8192"),
        ({"size": "8", "crop": 4}, "data.crop takes windows .*choose one"),
    ],
)
def test_settings_that_say_nothing(theirs, settings, message):
    with refused(message):
        Stream(DataConfig(path=theirs, **settings), seed=0, round_size=4)


def test_a_picture_too_small_for_a_window_is_named_or_skipped(tmp_path, monkeypatch):
    write(tmp_path, "train.tar", range(12))
    index(str(tmp_path))
    with refused(r"train.tar, key 0000000\d\d: .* is less than data.crop=70"):
        take(str(tmp_path), 1, crop=70)
    monkeypatch.setattr("naign.data.loader.BROKEN", 0.9)
    images, keys = take(
        str(tmp_path),
        1,
        crop=70,
        broken="skip",
    )
    assert images.shape == (12, 3, 70, 70)
    assert not {int(key) % 6 for key in keys} & {0, 1, 4}


@pytest.mark.slow
def test_points_have_no_size(points):
    check_config(DataConfig(path=points, size="8"))
    with refused(r"data.size and data.crop are of pictures"):
        Stream(DataConfig(path=points, size="8"), seed=0, round_size=4)
