"""Windows, mirroring and broken samples: the same on every world size and number of workers."""

import logging
import tarfile
from itertools import product

import pytest
import torch

from naign.data.dataset import DataConfig
from naign.data.format.writer import pack
from naign.data.loader import read_split
from tests.data.numbered import numbered, rewrite, take
from tests.refused import refused


@pytest.fixture
def larger(tmp_path):
    """23 images (3, 8, 10), not square."""
    path = f"{tmp_path}/larger"
    pack(numbered(shape=(3, 8, 10)), path, shards=4)
    return path


def test_windows_are_parts_of_the_images_and_all_places_come(larger):
    images, _ = read_split(larger, "train")
    whole = {int(image[0, 0, 0]): image for image in images}
    windows, keys = take(
        larger,
        20,
        crop=6,
        flip=True,
    )
    places = []
    for window, key in zip(windows, keys, strict=True):
        image = whole[int(key[-3:])]
        found = []
        for top, left, flipped in product(range(3), range(5), (False, True)):
            part = image[:, top : top + 6, left : left + 6]
            if torch.equal(window, part.flip(-1) if flipped else part):
                found.append((top, left, flipped))
        assert len(found) == 1
        places += found
    assert len({place[:2] for place in places}) == 15
    assert 80 < sum(flipped for _, _, flipped in places) < 160  # of 240


def test_evaluation_sees_the_central_window(larger):
    whole, _ = read_split(larger, "test")
    windows, _ = read_split(DataConfig(path=larger, crop=4), "test")
    assert torch.equal(windows, whole[:, :, 2:6, 3:7])


def broken(path, shard, *numbers):
    """Put no picture into samples of a shard; the manifest agrees."""

    def change(members):
        changed = dict(members)
        pictures = [name for name in changed if name.endswith(".png")]
        for number in numbers:
            changed[pictures[number]] = b"no picture"
        return list(changed.items())

    rewrite(path, shard, change)


@pytest.mark.parametrize("world, workers", [(1, 2), (3, 0)])
def test_skipping_takes_the_next_sound_sample_of_the_shard(
    packed,
    world,
    workers,
    caplog,
    monkeypatch,
):
    monkeypatch.setattr("naign.data.loader.BROKEN", 0.5)
    _, sound = take(packed, 4)
    broken(
        packed,
        "train-00002.tar",
        1,
        2,
        5,
    )
    with caplog.at_level(logging.WARNING, logger="naign.data"):
        images, keys = take(
            packed,
            4,
            world=world,
            workers=workers,
            broken="skip",
        )
    assert [f"train-{index:03d}" for index in images[:, 0, 0, 0].tolist()] == keys
    replaced = {old: new for old, new in zip(sound, keys, strict=True) if old != new}
    assert len(replaced) == 3
    assert not set(replaced) & set(replaced.values()) - set(sound)
    order = [key for key in read_order(packed) if key in set(sound)]
    assert replaced == {
        order[1]: order[3],
        order[2]: order[3],
        order[5]: order[0],
    }
    for key in replaced:
        assert f"train-00002.tar, key {key}: the .png cannot be decoded" in caplog.text


def read_order(path):
    """Keys of shard 2 in their order."""
    with tarfile.open(f"{path}/train-00002.tar") as tar:
        return [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]


def test_one_broken_sample_is_allowed_whatever_the_ranks(packed, caplog):
    broken(packed, "train-00002.tar", 1)
    config = DataConfig(path=packed, broken="skip")
    take(packed, 1, world=3, broken="skip")
    take(packed, 4, broken="skip")  # and once more in the next epoch
    assert len(read_split(config, "train")[0]) == 23
    assert "skipped: " in caplog.text
    broken(packed, "train-00002.tar", 3)
    with refused(r"2 broken samples of 23 are more than data.broken=skip allows, 1% \(1\)"):
        read_split(config, "train")


def test_more_broken_samples_than_allowed_stop_the_run(packed, monkeypatch):
    broken(packed, "train-00002.tar", 1, 2)
    with refused("2 broken samples of .* are more than data.broken=skip allows, 1% "):
        take(packed, 2, broken="skip")
    monkeypatch.setattr("naign.data.loader.BROKEN", 2 / 23)
    take(packed, 2, broken="skip")
    monkeypatch.setattr("naign.data.loader.BROKEN", 1.0)
    broken(packed, "train-00001.tar", *range(6))
    with refused(r"00001.tar: none of its 6 samples can be decoded"):
        take(packed, 2, broken="skip")
