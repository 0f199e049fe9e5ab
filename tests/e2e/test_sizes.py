"""From tars of pictures of many sizes, which are not square, to a network that is measured and repairs a photograph."""

import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from naign.data.dataset import parse_resize
from naign.data.format.indexing import index
from naign.errors import InputError
from naign.evaluate.recorded import recorded
from naign.model.naign import NAIGN
from naign.storage.network import granted
from naign.storage.s3_client import forget_clients
from naign.storage.store import open_store
from tests.conftest import SMALL
from tests.data.test_resize import PHOTOS, write
from tests.programs import refused, succeeded

pytestmark = pytest.mark.slow

SIZED = ["--data.size=16x24", "--data.flip"]


@pytest.mark.parametrize("network", ["conv", "spatial"])
def test_pictures_of_many_sizes_are_trained_on_and_measured(train, naign, tmp_path, network):
    for number in range(3):
        write(tmp_path / "theirs", f"{number:05d}.tar", range(50 * number, 50 * number + 50))
    write(tmp_path / "theirs", "val-00000.tar", range(150, 170))
    index(str(tmp_path / "theirs"))
    options = ["--data.path=theirs", *SMALL, *SIZED, f"--model.name={network}", "--run.path=run"]
    succeeded(train(*options, "--train.images=512", ranks=2))
    refused(train(*options, "--train.images=1024", "--data.size=24x16", "--resume=changed"), "data.size")
    succeeded(train(*options, "--train.images=1024", "--resume=changed"))

    model = NAIGN.from_pretrained(tmp_path / "run")
    config, _ = recorded(model, str(tmp_path / "run"), str(tmp_path / "theirs"))
    resize = parse_resize(config)
    assert model.shape == (3, 16, 24) and (resize.height, resize.width) == (16, 24)
    succeeded(naign("evaluate run --samples=50"))
    succeeded(
        naign(
            "restore",
            "run",
            *map(str, PHOTOS),
            "--to=out",
            "--size=model",
        )
    )
    for photo in PHOTOS:
        assert np.asarray(Image.open(tmp_path / f"out/{photo.stem}.png")).shape == (16, 24, 3)
    succeeded(naign("sample run --to=samples.png"))


def test_a_folder_is_packed_to_a_size_that_is_not_square(naign, tmp_path):
    for photo in PHOTOS:
        (tmp_path / photo.name).write_bytes(photo.read_bytes())
    done = succeeded(naign("pack folder --root=. --size=20x32 --to=packed"))
    assert "3x20x32" in done.stdout
    refused(naign("pack folder --root=. --size=20by32 --to=packed"), "--size is '20by32'")


def test_a_bucket_that_may_only_be_read_is_indexed_and_trained_on(train, naign, s3, bucket, tmp_path, monkeypatch):
    write(tmp_path / "theirs", "00000.tar", range(60))
    write(tmp_path / "theirs", "00001.tar", range(60, 120))
    store = open_store(f"{bucket}/theirs")
    for file in ("00000.tar", "00001.tar"):
        store.put(file, (tmp_path / "theirs" / file).read_bytes())
    for name, value in s3.reader(bucket.removeprefix("s3://")).items():
        monkeypatch.setenv(name, value)
    forget_clients()
    granted.clear()  # by the account that wrote the tars
    deadline = time.monotonic() + 30
    while True:  # the server hears of accounts a little later
        with suppress(InputError):
            assert len(store.list()) == 2
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(InputError, match="access denied"):
        store.put("mine", b"")
    refused(naign(f"index {bucket}/theirs"), "access denied", "--to")
    succeeded(naign(f"index {bucket}/theirs --to=index"))
    options = [f"--data.path={bucket}/theirs", "--data.index=index", *SMALL, *SIZED, "--run.path=run"]
    for images in (256, 512):
        done = succeeded(train(*options, f"--train.images={images}", "--resume=changed"))
    assert "goes on with another train.images: 256 there" in done.stderr
    succeeded(naign(f"verify {bucket}/theirs --index=index"))
    assert sorted(store.list()) == ["00000.tar", "00001.tar"]
