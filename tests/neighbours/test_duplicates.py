"""Near-duplicates: all that are planted and nothing else, whatever the blocks."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.sources.source import Made
from naign.neighbours import rows
from naign.neighbours.images import Images
from tests.data.numbered import edit_index, numbered, replaced, rewrite
from tests.neighbours.planted import GROUPS, TEST, TRAIN, audit, image, plant, read_csv, small_blocks
from tests.refused import refused


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    small_blocks(monkeypatch)


def groups_in(folder):
    groups = {}
    for line in read_csv(folder / "groups.csv"):
        groups.setdefault(line["group"], set()).add(line["key"])
    return set(map(frozenset, groups.values()))


def test_every_planted_copy_is_found_and_nothing_else(planted, tmp_path):
    found = audit(planted, tmp_path)
    assert groups_in(tmp_path) == GROUPS
    assert found["images_in_groups"] == sum(map(len, GROUPS))
    assert found["test_images_near_training"] == 2
    assert found == json.loads((tmp_path / "duplicates.json").read_text())
    redundant = {line["key"] for line in read_csv(tmp_path / "groups.csv") if line["redundant"] == "1"}
    assert found["redundant"] == len(redundant)
    for group in GROUPS:
        training = {key for key in group if key.startswith("train")}
        if len(training) < len(group):
            assert group & redundant == training
        else:
            assert len(group & redundant) == len(training) - 1
    assert set(os.listdir(tmp_path)) == {"duplicates.json", "groups.csv", "groups.png"}


def test_distances_are_those_of_brute_force(planted, tmp_path):
    audit(planted, tmp_path, threshold=90.0)  # which random pairs are within as well
    every = {f"train-{number:03d}": image("train", number) for number in range(TRAIN)}
    every |= {f"test-{number:03d}": image("test", number) for number in range(TEST)}
    pixels = np.stack(list(every.values())).astype(float)
    straight = pixels.reshape(len(pixels), -1)
    mirrored = pixels[..., ::-1].reshape(len(pixels), -1)
    distances = np.minimum(cdist(straight, straight), cdist(straight, mirrored))
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(1) / straight.shape[1] ** 0.5
    near = {}
    for key, distance in zip(every, nearest, strict=True):
        if distance <= 90:
            near[key] = pytest.approx(distance, rel=1e-12)
    assert len(near) > 100
    found = {line["key"]: float(line["distance"]) for line in read_csv(tmp_path / "groups.csv")}
    assert found == near


def test_many_copies_of_one_image_are_all_pairs(tmp_path):
    def make(index):
        return f"train-{index}", np.full((1, 4, 4), index // 30, np.uint8), 0

    source = numbered(train=60, test=5)
    splits = dict(source.splits) | {"train": Made(length=60, make=make)}
    data = f"{tmp_path}/data"
    pack(replace(source, splits=splits), data, shards=3, progress=False)
    found = audit(data, tmp_path / "to", threshold=0.5)
    assert found["pairs"] == 2 * 30 * 29 / 2
    assert found["groups"] == 2
    assert found["redundant"] == 58


def test_known_broken_images_are_no_duplicates(tmp_path):
    path = plant(f"{tmp_path}/data")
    shard = Manifest.load(path).split("train").shards[0].name
    key = Images(DataConfig(path=path), "train").places([0])[0].key
    rewrite(path, shard, replaced(f"{key}.png", b""))
    with refused(f"key {key}: the .png cannot be decoded"):
        audit(path, tmp_path / "to")
    edit_index(path, broken={shard: [key]})
    audit(path, tmp_path / "to")
    left = {group - {key} for group in GROUPS}
    assert groups_in(tmp_path / "to") == {group for group in left if len(group) > 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder": "digits-cnn64"}, "has no default threshold"),
        ({"encoder": "nothing", "threshold": 8.0}, "encoder is 'nothing': choose one of"),
    ],
)
def test_bad_options_are_one_sentence(options, message, planted, tmp_path):
    with refused(message):
        audit(planted, tmp_path, **options)


def test_bad_data_is_one_sentence(points, tmp_path):
    pack(numbered(train=1, test=1), f"{tmp_path}/single", shards=1, progress=False)
    index = tmp_path / "single/index.json"
    content = json.loads(index.read_text())
    del content["splits"]["test"]
    index.write_text(json.dumps(content))
    with refused("holds one image"):
        audit(f"{tmp_path}/single", tmp_path / "to")
    with refused("holds points: only images can be compared"):
        audit(points, tmp_path / "to")


def test_a_full_disk_is_one_sentence(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(rows.tempfile, "TemporaryFile", lambda: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with refused("set TMPDIR to a folder with more space"):
        audit(planted, tmp_path)


def test_too_many_pairs_are_refused(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_PAIRS", 50)
    with refused("pairs may be within the threshold: lower --threshold"):
        audit(planted, tmp_path, threshold=500.0)
