"""Pictures of any size, mode and state: repaired and mapped at their own size, or refused before any is written."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw

from naign.cli import model as cli
from naign.cli.main import main
from naign.data.scale import eight_bits
from naign.errors import InputError
from naign.evaluate.recorded import read_image, sees_wholes
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, SpatialConfig
from tests.data.test_resize import PHOTOS

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIDE = 16
TINY = ConvConfig(width=4, code=8)


@pytest.fixture(scope="module")
def colour(tmp_path_factory, save_untrained):
    folder = tmp_path_factory.mktemp("colour")
    return save_untrained(folder, data=None, shape=(3, SIDE, SIDE), config=TINY)


@pytest.fixture(scope="module")
def grey(tmp_path_factory, save_untrained):
    folder = tmp_path_factory.mktemp("grey")
    return save_untrained(folder, data=None, shape=(1, SIDE, SIDE), config=TINY)


def picture(width=40, height=25, mode="RGB"):
    return Image.open(PHOTOS[0]).resize((width, height)).convert(mode)


def values(image):
    """A picture as the model is given it: (1, C, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def as_picture(made):
    """(1, C, H, W) as the rows of a picture."""
    return eight_bits(made[0]).permute(1, 2, 0).numpy()


def assert_same(picture, expected):
    assert np.array_equal(np.array(picture), np.array(expected))


def restored(model, file, **options):
    """The repair of a file, in tiles unless `size` says otherwise."""
    if "mask" not in options:
        options = {"size": "picture", **options}
    cli.restore(model, (file,), to=file.parent / "out", **options)
    return Image.open(file.parent / "out" / f"{file.stem}.png")


def test_a_folder_that_cannot_be_read_is_named(grey, tmp_path, monkeypatch):
    for place in ("a.png", "inner/b.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        picture(mode="L").save(tmp_path / place)
    scan = os.scandir

    def locked(path):
        if os.path.basename(path) == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", locked)
    with pytest.raises(InputError, match="inner: cannot be read .Permission denied.: check the owner and mode"):
        cli.score(grey, (tmp_path,))


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs the program, a line of words, in the test's folder; it must end with code 2. Returns the line it says."""

    def run(line):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["naign", *line.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert message.startswith("naign: error: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.fixture
def x(tmp_path):
    """The file of a picture."""
    picture().save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (5, 90),
        (40, 25),
    ],
)
def test_the_repair_is_that_of_the_model_at_the_picture_s_size(colour, tmp_path, size):
    given = picture(*size)
    given.save(tmp_path / "x.png")
    made = restored(colour, tmp_path / "x.png")
    assert_same(made, as_picture(NAIGN.from_pretrained(colour).project(values(given))))


def test_the_repair_at_the_model_s_size(colour, x):
    model = NAIGN.from_pretrained(colour)
    resized = read_image(x.read_bytes(), model)
    made = restored(colour, x, size="model")
    assert_same(made, as_picture(model.project(resized)))


def test_an_f_with_one_code_for_a_picture_gets_it_resized(colour, x, tmp_path, save_untrained, capsys):
    """Unless it was trained on windows, or holes are to be filled; tiles are for an f with a grid of codes."""
    Image.linear_gradient("L").resize((40, 25)).save(tmp_path / "mask.png")
    config = SpatialConfig(width=4, depth=0, code=2)
    spatial = save_untrained(tmp_path / "spatial", data=None, shape=(3, SIDE, SIDE), config=config)
    for model, options, size in (
        (colour, {}, (SIDE, SIDE)),
        (colour, {"mask": tmp_path / "mask.png"}, (40, 25)),
        (colour, {"size": "picture"}, (40, 25)),
        (spatial, {}, (40, 25)),
        (spatial, {"size": "picture"}, (40, 25)),
    ):
        cli.restore(model, (x,), to=tmp_path / "out", **options)
        assert Image.open(tmp_path / "out/x.png").size == size
        printed = capsys.readouterr().out
        assert ("each is 16 x 16, as f has one code" in printed) == (size == (SIDE, SIDE))
        assert ("each was repaired in tiles" in printed) == (model == colour and "size" in options)
    model = NAIGN.from_pretrained(colour)
    model.metadata["config"] = {"data": {"crop": SIDE}}
    assert not sees_wholes(model)


def test_the_profile_is_kept_and_transparency_lies_on_white(colour, grey, tmp_path):
    layer = picture(mode="RGBA")
    layer.putalpha(Image.linear_gradient("L").resize(layer.size))
    white = Image.new("RGBA", layer.size, "white")
    layer.save(tmp_path / "layer.png", icc_profile=SRGB)
    Image.alpha_composite(white, layer).convert("RGB").save(tmp_path / "white.png")
    made = restored(colour, tmp_path / "layer.png")
    expected = restored(colour, tmp_path / "white.png")
    assert made.info["icc_profile"] == SRGB
    assert "icc_profile" not in expected.info
    assert_same(made, expected)
    made = restored(grey, tmp_path / "layer.png")
    assert made.mode == "L"
    assert "icc_profile" not in made.info  # the profile is of colours


def test_exif_orientation_is_applied(colour, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture().save(tmp_path / "turned.png", exif=exif)
    picture().transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    made = restored(colour, tmp_path / "turned.png")
    assert 0x0112 not in made.getexif()
    assert_same(made, restored(colour, tmp_path / "upright.png"))


@pytest.mark.parametrize("mode", ["1", "LA", "P", "CMYK", "I;16"])
def test_other_modes_are_converted(colour, grey, tmp_path, mode):
    if mode == "I;16":
        pixels = np.arange(1000, dtype=np.uint16) * 64
        source = Image.fromarray(pixels.reshape(25, 40))
    else:
        source = picture(mode=mode)
    source.save(tmp_path / "x.tif")
    for model, expected in ((grey, "L"), (colour, "RGB")):
        made = restored(model, tmp_path / "x.tif")
        assert made.size == (40, 25)
        assert made.mode == expected


def test_one_picture_goes_to_the_file_and_format_that_is_named(colour, tmp_path):
    x = tmp_path / "x.png"
    picture(mode="RGBA").save(x, icc_profile=SRGB)
    cli.restore(colour, (x,), to=tmp_path / "deep/y.jpg", size="picture")
    made = Image.open(tmp_path / "deep/y.jpg")
    assert made.format == "JPEG"
    assert made.mode == "RGB"
    assert made.size == (40, 25)
    assert made.info["icc_profile"] == SRGB
    cli.restore(colour, (x,), to=tmp_path / "deep/whole.jpg", size="model")
    assert Image.open(tmp_path / "deep/whole.jpg").size == (SIDE, SIDE)
    with pytest.raises(InputError, match="would overwrite the input"):
        cli.restore(colour, (x,), to=x)
    for files, to in (
        ((x,), "y.webp"),
        ((x, tmp_path / "deep/y.jpg"), "z.jpg"),
    ):
        with pytest.raises(InputError, match="only one picture may go to a file"):
            cli.restore(colour, files, to=tmp_path / to)
    assert set(os.listdir(tmp_path)) == {"x.png", "deep"}


def test_a_jpeg_too_large_for_its_format_is_refused(colour, tmp_path, refused):
    Image.new("L", (65501, 1)).save(tmp_path / "x.png")
    assert "image" in refused(f"restore {colour} x.png --to=y.jpg --size=picture")
    assert not Path("y.jpg").exists()


def write_truncated(path):
    picture().save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "too large a picture": lambda path: picture(80, 25).save(path),
    "truncated": write_truncated,
    "mode F": lambda path: Image.new("F", (40, 25)).save(path, "TIFF"),
    "beyond 16": lambda path: Image.new("I", (40, 25), 70_000).save(path, "TIFF"),
    "pic": lambda path: path.write_text("not a picture"),
}


@pytest.mark.parametrize("problem", BAD)
@pytest.mark.parametrize("command", ["restore", "score --map"])
def test_a_bad_picture_is_refused_before_any_is_written(colour, tmp_path, monkeypatch, refused, problem, command):
    (tmp_path / "in").mkdir()
    picture().save(tmp_path / "in/a.png")
    BAD[problem](tmp_path / "in/b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # twice as many are refused
    message = refused(f"{command} {colour} in")
    assert "in/b.png: " in message
    assert problem in message
    assert set(os.listdir(tmp_path)) == {"in"} and set(os.listdir("in")) == {"a.png", "b.png"}


def test_links_in_a_loop_and_pipes_are_refused(colour, tmp_path, refused):
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    picture().save(tmp_path / "a.png")
    assert "loop.png" in refused(f"restore {colour} loop.png --to b.png")
    assert "loop.png" in refused(f"restore {colour} a.png --mask loop.png --to b.png")
    assert "pipe.png is a pipe" in refused(f"score {colour} pipe.png")
    assert not (tmp_path / "b.png").exists()


def test_maps_lie_beside_their_pictures_and_are_passed_over_the_next_time(colour, tmp_path, capsys):
    for name in ("a.png", "deep/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    for _ in range(2):
        cli.score(colour, (tmp_path,), map=True)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
    model = NAIGN.from_pretrained(colour)
    x = values(picture())
    energy = float(lines[1].rpartition(",")[2])
    assert energy == pytest.approx(float(model.energy(x)), rel=1e-4)
    drawn = Image.open(tmp_path / "a.png.map.png")
    assert drawn.mode == "L"
    moved = (model.project(x) - x).abs().mean(1)[0]
    expected = moved.clamp(max=1) * 255
    assert np.abs(np.array(drawn) - expected.numpy()).max() < 1
    assert Image.open(tmp_path / "deep/a.jpg.map.png").size == (40, 25)


@pytest.fixture
def hole():
    """A mask of the picture: a box and a line."""
    mask = Image.new("L", (40, 25), 30)
    ImageDraw.Draw(mask).rectangle((20, 5, 30, 12), fill=255)
    ImageDraw.Draw(mask).line((2, 20, 12, 22), fill=200)
    return mask


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_what_is_known_stays_bit_for_bit(colour, tmp_path, hole, mode):
    given = picture().convert(mode)
    given.save(tmp_path / "x.tif")
    hole.save(tmp_path / "mask.png")
    made = restored(colour, tmp_path / "x.tif", mask=tmp_path / "mask.png")
    before = np.array(given.convert(made.mode))
    changed = (np.array(made) != before).any(2)
    inside = np.array(hole) > 127
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.9


def test_a_hole_is_filled_as_by_the_model_whose_tiles_see_its_surroundings(colour, tmp_path):
    x = Image.open(PHOTOS[0])
    mask = Image.new("1", x.size)
    mask.paste(1, (300, 200, 320, 210))
    x.save(tmp_path / "x.png")
    mask.save(tmp_path / "mask.png")
    made = restored(colour, tmp_path / "x.png", mask=tmp_path / "mask.png", times=2)
    near = (300 - SIDE, 200 - SIDE, 320 + SIDE, 210 + SIDE)
    known = torch.from_numpy(np.array(mask.crop(near)))
    expected = NAIGN.from_pretrained(colour).project(values(x.crop(near)), mask=known, times=2)
    assert_same(made.crop(near), as_picture(expected))
    assert (np.array(made) != np.array(x)).any(2).sum() <= 200


def test_a_mask_is_not_overwritten(colour, tmp_path, hole):
    mask = tmp_path / "x.png"
    picture().save(tmp_path / "x.jpg")
    hole.save(mask)
    with pytest.raises(InputError, match=r"would overwrite the input .*x.png"):
        cli.restore(colour, (tmp_path / "x.jpg",), to=tmp_path, mask=mask)
    assert_same(Image.open(mask), hole)


BAD_MASKS = {
    "mask.png has 25 x 40 pixels, its picture 40 x 25: make them equal": Image.new("L", (25, 40)),
    "mask.png has no hole: paint what is to be filled white": Image.new("L", (40, 25)),
    "mask.png is a hole altogether: paint what is to be kept black": Image.new("L", (40, 25), 255),
    "mask.png: No such file": None,
}


@pytest.mark.parametrize("problem", BAD_MASKS)
def test_a_mask_that_cannot_be_used_is_refused(colour, x, tmp_path, refused, problem):
    mask = BAD_MASKS[problem]
    if mask:
        mask.save(tmp_path / "mask.png")
    assert problem in refused(f"restore {colour} x.png --mask mask.png")
    assert not Path("restored").exists()


def test_a_size_that_contradicts_a_mask_is_refused(colour, tmp_path):
    with pytest.raises(InputError, match="--mask is for pictures at their own size: leave out --size model"):
        cli.restore(colour, (tmp_path / "x.png",), mask=tmp_path / "mask.png", size="model")
