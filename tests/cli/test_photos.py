"""Pictures of any size, mode and state: repaired and mapped at their own size, or refused before any is written."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw

from naign.cli import model as cli
from naign.cli.main import main
from naign.errors import InputError
from naign.evaluate.recorded import read_image, sees_wholes
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, SpatialConfig
from naign.observe.pictures import eight_bits
from tests.data.test_resize import PHOTOS

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIDE = 16


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory, save_untrained: Callable[..., str]) -> str:
    folder = tmp_path_factory.mktemp("models") / "colour"
    return save_untrained(folder, data=None, shape=(3, SIDE, SIDE), config=ConvConfig(width=4, code=8))


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory, save_untrained: Callable[..., str]) -> str:
    folder = tmp_path_factory.mktemp("models") / "grey"
    return save_untrained(folder, data=None, shape=(1, SIDE, SIDE), config=ConvConfig(width=4, code=8))


def picture(width: int = 40, height: int = 25, mode: str = "RGB") -> Image.Image:
    return Image.open(PHOTOS[0]).resize((width, height)).convert(mode)


def restored(model: str, file: Path, **options: Any) -> Image.Image:
    cli.restore(
        model, (file,), to=file.parent / "out", **({"size": None if options.get("mask") else "picture"} | options)
    )
    return Image.open(file.parent / "out" / f"{file.stem}.png")


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the program prints as it ends with code 2: one line."""
    monkeypatch.setattr("sys.argv", ["naign", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        main()
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("naign: error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("size", [(1, 1), (SIDE, SIDE), (5, 90), (SIDE + 1, SIDE), (40, 25)])
def test_the_repair_is_that_of_the_model_at_the_picture_s_size(colour: str, tmp_path: Path, size: Any) -> None:
    picture(*size).save(tmp_path / "x.png")
    model = NAIGN.from_pretrained(colour)
    x = torch.from_numpy(np.array(picture(*size)).transpose(2, 0, 1))[None] / 127.5 - 1
    expected = eight_bits(model.project(x)[0]).permute(1, 2, 0).numpy()
    made = np.asarray(restored(colour, tmp_path / "x.png"))
    assert made.shape == expected.shape and np.abs(made.astype(int) - expected).max() <= 1


def test_the_model_s_size_as_before(colour: str, grey: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png")
    for folder in (colour, grey):
        model = NAIGN.from_pretrained(folder)
        expected = model.project(read_image((tmp_path / "x.png").read_bytes(), model))
        made = restored(folder, tmp_path / "x.png", size="model")
        assert made.mode == "RGB" and made.size == (SIDE, SIDE)
        assert np.array_equal(np.asarray(made).transpose(2, 0, 1), eight_bits(expected[0]).expand(3, SIDE, SIDE))


def test_an_f_with_one_code_for_a_picture_gets_it_resized(
    colour: str, tmp_path: Path, save_untrained: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it was trained on windows, or holes are to be filled; tiles are for an f with a grid of codes."""
    picture().save(tmp_path / "x.png")
    Image.linear_gradient("L").resize((40, 25)).save(tmp_path / "mask.png")
    config = SpatialConfig(width=4, depth=0, code=2)
    grid = save_untrained(tmp_path / "grid", data=None, shape=(3, SIDE, SIDE), config=config)
    for model, options, size in (
        (colour, {}, (SIDE, SIDE)),
        (colour, {"size": "picture"}, (40, 25)),
        (colour, {"mask": tmp_path / "mask.png"}, (40, 25)),
        (grid, {}, (40, 25)),
    ):
        cli.restore(model, (tmp_path / "x.png",), to=tmp_path / "out", **options)
        assert Image.open(tmp_path / "out/x.png").size == size
        assert ("each is 16 x 16, as f has one code" in capsys.readouterr().out) == (size == (SIDE, SIDE))
    model = NAIGN.from_pretrained(colour)
    model.metadata["config"] = {"data": {"crop": SIDE}}
    assert not sees_wholes(model)


def test_profile_and_alpha_are_kept_and_on_white_it_is_the_repair_of_the_picture_on_white(
    colour: str, grey: str, tmp_path: Path
) -> None:
    layer = picture(mode="RGBA")
    layer.putalpha(Image.linear_gradient("L").resize(layer.size))
    white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    layer.save(tmp_path / "layer.png", icc_profile=SRGB)
    white.save(tmp_path / "white.png")
    made, expected = (restored(colour, tmp_path / f"{name}.png") for name in ("layer", "white"))
    assert made.mode == "RGBA" and made.info["icc_profile"] == SRGB and "icc_profile" not in expected.info
    assert np.array_equal(np.asarray(made)[..., 3], np.asarray(layer)[..., 3])
    shown = Image.alpha_composite(Image.new("RGBA", made.size, "white"), made).convert("RGB")
    # A colour that is not possible at this alpha is clipped; else they differ by rounding.
    close = np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).max(2) <= 2
    assert close[np.asarray(layer)[..., 3] > 200].mean() > 0.95
    made = restored(grey, tmp_path / "layer.png")
    assert made.mode == "LA" and "icc_profile" not in made.info  # the profile is of colours


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(colour: str, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "turned.png", exif=exif)
    made = restored(colour, tmp_path / "turned.png")
    assert made.size == ((40, 25) if orientation < 5 else (25, 40)) and 0x0112 not in made.getexif()
    if orientation == 3:
        picture().transpose(Image.Transpose.ROTATE_180).save(tmp_path / "upright.png")
        assert np.array_equal(np.asarray(made), np.asarray(restored(colour, tmp_path / "upright.png")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_modes_are_converted(colour: str, grey: str, tmp_path: Path, mode: str, channels: int) -> None:
    source = (
        Image.fromarray(np.arange(1000, dtype=np.uint16).reshape(25, 40) * 64) if mode == "I;16" else picture(mode=mode)
    )
    suffix = ".tif" if mode == "CMYK" else ".png"
    source.save(tmp_path / f"x{suffix}")
    made = restored(grey if channels == 1 else colour, tmp_path / f"x{suffix}")
    assert made.size == (40, 25) and made.mode == ("L" if channels == 1 else "RGB") + ("A" if mode == "LA" else "")


def test_of_an_animation_the_first_frame_is_repaired(colour: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "still.png")
    picture().save(tmp_path / "x.png", save_all=True, append_images=[Image.new("RGB", (40, 25))])
    assert np.array_equal(*(np.asarray(restored(colour, tmp_path / name)) for name in ("x.png", "still.png")))


def test_one_picture_goes_to_the_file_and_format_that_is_named(colour: str, tmp_path: Path) -> None:
    picture(mode="RGBA").save(tmp_path / "x.png", icc_profile=SRGB)
    cli.restore(colour, (tmp_path / "x.png",), to=tmp_path / "deep/y.jpg", size="picture")
    made = Image.open(tmp_path / "deep/y.jpg")
    assert (made.format, made.mode, made.size, made.info["icc_profile"]) == ("JPEG", "RGB", (40, 25), SRGB)
    with pytest.raises(InputError, match="would overwrite the input"):
        cli.restore(colour, (tmp_path / "x.png",), to=tmp_path / "x.png")
    cli.restore(colour, (tmp_path / "x.png",), to=tmp_path / "deep/whole.jpg", size="model")
    assert Image.open(tmp_path / "deep/whole.jpg").size == (SIDE, SIDE)
    for options in ({"damage": "blur"}, {"to": tmp_path / "y.webp"}):
        with pytest.raises(InputError, match="only one picture, without --damage, may go to a file"):
            cli.restore(colour, (tmp_path / "x.png",), **{"to": tmp_path / "y.png", **options})
    with pytest.raises(InputError, match="only one picture"):
        cli.restore(colour, (tmp_path / "x.png", tmp_path / "deep/y.jpg"), to=tmp_path / "z.jpg")
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", "deep"}


def test_damage_is_that_of_the_picture_s_size(colour: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png")
    repaired = np.asarray(restored(colour, tmp_path / "x.png", damage="rows"))
    damaged = Image.open(tmp_path / "out/rows/x.png")
    assert damaged.size == (40, 25) and (np.asarray(damaged) == 0).all((1, 2)).sum() == 4
    damaged.save(tmp_path / "again.png")
    assert np.array_equal(np.asarray(restored(colour, tmp_path / "again.png")), repaired)


def header_only(path: Path, width: int, height: int) -> None:
    """A PNG that claims so many pixels and holds none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_bad(path: Path, kind: str) -> None:
    content = io.BytesIO()
    picture().save(content, "JPEG")
    match kind:
        case "huge":
            header_only(path, 50_000, 20_000)
        case "truncated":
            path.write_bytes(content.getvalue()[:-100])
        case "float":
            Image.fromarray(np.zeros((25, 40), np.float32)).save(path, "TIFF")
        case "beyond":
            Image.fromarray(np.full((25, 40), 70_000, np.int32)).save(path, "TIFF")
        case "text":
            path.write_text("no picture")


BAD = {
    "huge": "too large a picture",
    "truncated": "truncated",
    "float": "mode F",
    "beyond": "beyond 16",
    "text": "not a pic",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("command", ["restore", "score --map"])
def test_a_bad_picture_is_refused_before_any_is_written(
    colour: str, tmp_path: Path, monkeypatch: Any, capsys: Any, kind: str, command: str
) -> None:
    (tmp_path / "in").mkdir()
    picture().save(tmp_path / "in/a.png")
    write_bad(tmp_path / "in/b.png", kind)
    monkeypatch.chdir(tmp_path)
    message = ended(monkeypatch, capsys, *command.split(), colour, "in")
    assert "in/b.png: " in message and BAD[kind] in message
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.png", "b.png"]


def test_maps_lie_beside_their_pictures_and_are_no_pictures_the_next_time(
    colour: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "deep/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    for _ in range(2):
        cli.score(colour, (tmp_path,), map=True)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
    model = NAIGN.from_pretrained(colour)
    x = torch.from_numpy(np.array(picture()).transpose(2, 0, 1))[None] / 127.5 - 1
    assert float(lines[1].rpartition(",")[2]) == pytest.approx(float(model.energy(x)), rel=1e-4)
    drawn = Image.open(tmp_path / "a.png.map.png")
    expected = (model.project(x) - x).abs().mean(1)[0].clamp(max=1) * 255
    assert drawn.mode == "L" and np.abs(np.asarray(drawn) - expected.numpy()).max() < 1
    assert Image.open(tmp_path / "deep/a.jpg.map.png").size == (40, 25)


@pytest.fixture
def hole() -> Image.Image:
    """A mask of the picture: a box and a line."""
    mask = Image.new("L", (40, 25), 30)
    ImageDraw.Draw(mask).rectangle((20, 5, 30, 12), fill=255)
    ImageDraw.Draw(mask).line((2, 20, 12, 22), fill=200)
    return mask


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_what_is_known_stays_bit_for_bit(colour: str, tmp_path: Path, hole: Image.Image, mode: str) -> None:
    given = picture(mode="RGB").convert(mode)
    if mode == "RGBA":
        given.putalpha(Image.linear_gradient("L").resize(given.size))
    given.save(tmp_path / "x.tif")
    hole.save(tmp_path / "mask.png")
    made = restored(colour, tmp_path / "x.tif", mask=tmp_path / "mask.png")
    before = np.asarray(given if mode in ("RGB", "RGBA") else given.convert("RGB"))
    changed = (np.asarray(made) != before).any(2)
    inside = np.asarray(hole) > 127
    assert not changed[~inside].any() and changed[inside].mean() > 0.9


def test_a_hole_is_filled_as_by_the_model_whose_tiles_see_its_surroundings(colour: str, tmp_path: Path) -> None:
    x, mask = Image.open(PHOTOS[0]), Image.new("1", (640, 427))
    mask.paste(1, (300, 200, 320, 210))
    x.save(tmp_path / "x.png")
    mask.save(tmp_path / "mask.png")
    made = np.asarray(restored(colour, tmp_path / "x.png", mask=tmp_path / "mask.png", times=2))
    near = np.asarray(x)[200 - SIDE : 210 + SIDE, 300 - SIDE : 320 + SIDE]
    hole = torch.from_numpy(np.array(mask)[200 - SIDE : 210 + SIDE, 300 - SIDE : 320 + SIDE])
    expected = NAIGN.from_pretrained(colour).project(
        torch.from_numpy(near.transpose(2, 0, 1).copy())[None] / 127.5 - 1, mask=hole, times=2
    )
    filled = made[200:210, 300:320].transpose(2, 0, 1).astype(int)
    assert np.abs(filled - eight_bits(expected[0])[:, SIDE:-SIDE, SIDE:-SIDE].numpy()).max() <= 1
    assert (made != np.asarray(x)).any(2).sum() <= 200


def test_each_picture_has_its_mask_by_name(
    colour: str, tmp_path: Path, hole: Image.Image, monkeypatch: Any, capsys: Any
) -> None:
    for name in ("in/a.jpg", "in/deep/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        picture().save(tmp_path / name)
    (tmp_path / "masks/deep").mkdir(parents=True)
    hole.save(tmp_path / "masks/a.png")
    monkeypatch.chdir(tmp_path)
    message = ended(monkeypatch, capsys, "restore", colour, "in", "--mask", "masks")
    assert "--mask masks holds no mask for in/deep/a.jpg: add deep/a.png" in message and not Path("restored").exists()
    Image.eval(hole, lambda value: 255 - value).save(tmp_path / "masks/deep/a.gif")
    cli.restore(colour, (Path("in"),), to=Path("out"), mask=Path("masks"))
    before, *after = (np.asarray(Image.open(name)) for name in ("in/a.jpg", "out/a.png", "out/deep/a.png"))
    inside = np.asarray(hole) > 127
    assert [bool((made != before).any(2)[inside].all()) for made in after] == [True, False]
    assert np.array_equal(after[1][inside], before[inside])


def test_masks_may_lie_beside_their_pictures_and_are_not_overwritten(
    colour: str, tmp_path: Path, hole: Image.Image
) -> None:
    x, mask = tmp_path / "in/x.jpg", tmp_path / "in/x.png"
    mask.parent.mkdir()
    picture().save(x)
    hole.save(mask)
    cli.restore(colour, (x,), to=tmp_path / "out", mask=mask)
    cli.restore(colour, (x,), to=tmp_path / "beside", mask=tmp_path / "in")
    assert (tmp_path / "out/x.png").read_bytes() == (tmp_path / "beside/x.png").read_bytes()
    for place in (mask, tmp_path / "in"):
        with pytest.raises(InputError, match=r"would overwrite the input .*in/x.png"):
            cli.restore(colour, (x,), to=tmp_path / "in", mask=place)
    with pytest.raises(InputError, match=r"--mask .*in holds .*x.jpg itself, and no mask for it: give the folder"):
        cli.restore(colour, (x.parent,), to=tmp_path / "all", mask=tmp_path / "in")
    hole.save(mask.with_suffix(".gif"))
    with pytest.raises(InputError, match=r"holds several for .*x.jpg: keep one of .*x.gif, .*x.png"):
        cli.restore(colour, (x,), to=tmp_path / "all", mask=tmp_path / "in")
    assert not (tmp_path / "all").exists() and np.array_equal(np.asarray(Image.open(mask)), np.asarray(hole))


def test_a_transparent_hole_is_seen_when_it_is_filled(colour: str, tmp_path: Path, hole: Image.Image) -> None:
    given, inside = picture(mode="RGBA"), np.asarray(hole) > 127
    given.putalpha(Image.fromarray(np.where(inside, 0, 100).astype(np.uint8)))
    given.save(tmp_path / "x.png")
    hole.save(tmp_path / "mask.png")
    made = np.asarray(restored(colour, tmp_path / "x.png", mask=tmp_path / "mask.png"))
    assert (made[..., 3] == np.where(inside, 255, 100)).all()
    assert np.array_equal(made[~inside], np.asarray(given)[~inside])


BAD_MASKS = {
    "size": ("mask.png has 25 x 40 pixels, x.png 40 x 25: make them equal", []),
    "none": ("mask.png has no hole: paint what is to be filled white", []),
    "all": ("mask.png is a hole altogether: paint what is to be kept black", []),
    "text": ("mask.png: not a picture that Pillow can read", []),
    "missing": ("mask.png: No such file", []),
    "model": ("--mask is for pictures at their own size: leave out --size model", ["--size", "model"]),
    "noise": ("--mask keeps what is outside holes, --damage changes it: leave out one", ["--damage", "noise"]),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_a_mask_that_cannot_be_used_is_refused(
    colour: str, tmp_path: Path, monkeypatch: Any, capsys: Any, hole: Image.Image, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("x.png")
    match kind:
        case "size":
            hole.transpose(Image.Transpose.ROTATE_90).save("mask.png")
        case "none" | "all":
            Image.new("L", (40, 25), 0 if kind == "none" else 255).save("mask.png")
        case "text":
            Path("mask.png").write_text("no picture")
        case "model" | "noise":
            hole.save("mask.png")
    text, options = BAD_MASKS[kind]
    assert text in ended(monkeypatch, capsys, "restore", colour, "x.png", "--mask", "mask.png", *options)
    assert not Path("restored").exists()
