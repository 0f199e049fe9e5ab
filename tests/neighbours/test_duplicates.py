"""Near-duplicates: all that are planted and nothing else, whatever the blocks."""

import csv
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.sources.source import Made
from naign.errors import InputError
from naign.neighbours import rows
from naign.neighbours.images import Images
from tests.data.numbered import edit_index, numbered, rewrite
from tests.neighbours.planted import (
    GROUPS,
    TEST,
    TRAIN,
    audit,
    image,
    plant,
    small_blocks,
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plant(str(tmp_path_factory.mktemp("planted")))


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def groups_in(folder: Path) -> dict[str, list[dict[str, str]]]:
    groups = dict[str, list[dict[str, str]]]()
    for line in csv.DictReader((folder / "groups.csv").read_text().splitlines()):
        groups.setdefault(line["group"], []).append(line)
    return groups


def test_every_planted_copy_is_found_and_nothing_else(planted: str, tmp_path: Path) -> None:
    found = audit(planted, tmp_path)
    groups = groups_in(tmp_path)
    assert {frozenset(line["key"] for line in group) for group in groups.values()} == GROUPS
    assert found["images_in_groups"] == sum(map(len, GROUPS)) and found["test_images_near_training"] == 2
    assert found == json.loads((tmp_path / "duplicates.json").read_text())
    for group in groups.values():
        lines = {line["key"]: line for line in group}
        redundant = {key for key, line in lines.items() if line["redundant"] == "1"}
        training = {key for key in lines if key.startswith("train")}
        if len(training) < len(lines):
            assert redundant == training
        else:
            assert len(redundant) == len(training) - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "duplicates.json",
        "groups.csv",
        "groups.png",
    ]


def test_distances_are_those_of_brute_force(planted: str, tmp_path: Path) -> None:
    audit(planted, tmp_path, threshold=90.0)  # which random pairs are within as well
    every = {f"train-{number:03d}": image("train", number) for number in range(TRAIN)}
    every |= {f"test-{number:03d}": image("test", number) for number in range(TEST)}
    pixels = np.stack(list(every.values())).astype(float)
    near = {}
    for at, key in enumerate(every):
        views = (pixels[at], pixels[at][..., ::-1])
        squares = np.minimum(*(((pixels - view) ** 2).mean((1, 2, 3)) for view in views))
        squares[at] = np.inf
        near[key] = float(np.sqrt(squares.min()))
    lines = [line for group in groups_in(tmp_path).values() for line in group]
    assert {line["key"] for line in lines} == {key for key, distance in near.items() if distance <= 90}
    assert len(lines) > 100
    assert all(float(line["distance"]) == pytest.approx(near[line["key"]], rel=1e-12) for line in lines)


def test_many_copies_of_one_image_are_all_pairs(tmp_path: Path) -> None:
    source = numbered(train=60, test=5)
    train = Made(
        length=60,
        make=lambda index: (
            f"train-{index}",
            np.full((1, 4, 4), index // 30, np.uint8),
            0,
        ),
    )
    source = replace(source, splits=dict(source.splits) | {"train": train})
    pack(source, str(tmp_path / "data"), shards=3, progress=False)
    found = audit(str(tmp_path / "data"), tmp_path / "to", threshold=0.5)
    assert found["pairs"] == 2 * len(list(combinations(range(30), 2))) and found["groups"] == 2
    assert found["redundant"] == 58


def test_known_broken_images_are_no_duplicates(planted: str, tmp_path: Path) -> None:
    path = plant(str(tmp_path / "data"))
    manifest = Manifest.load(path)
    shard = manifest.split("train").shards[0].name
    images = Images(DataConfig(path=path), "train")
    key = images.places([0])[0].key
    rewrite(
        path,
        shard,
        lambda members: [(name, b"" if name == f"{key}.png" else data) for name, data in members],
    )
    with pytest.raises(InputError, match=f"key {key}: the .png cannot be decoded"):
        audit(path, tmp_path / "to")
    edit_index(path, broken={shard: [key]})
    audit(path, tmp_path / "to")
    found = {frozenset(line["key"] for line in group) for group in groups_in(tmp_path / "to").values()}
    assert found == {group - {key} for group in GROUPS if len(group - {key}) > 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "--threshold is -1.0: it must be 0 or more"),
        (
            {"threshold": float("inf")},
            "--threshold is inf: it must be 0 or more, below 1e6",
        ),
        (
            {"threshold": None, "encoder": "digits-cnn64"},
            "have no default threshold",
        ),
        ({"encoder": "nothing"}, "encoder is 'nothing': choose one of"),
        ({"encoder": "mnist-cnn64"}, "--encoder 'mnist-cnn64' reads"),
        ({"to": "{file}/below"}, "file/below"),
    ],
)
def test_bad_options_are_one_sentence(options: dict, message: str, planted: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    to = options.pop("to", "{folder}/to").format(file=tmp_path / "file", folder=tmp_path)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        audit(planted, to, **{"threshold": 8.0} | options)


def test_bad_data_is_one_sentence(planted: str, points: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data set here"):
        audit(str(tmp_path / "none"), tmp_path / "to")
    path = plant(str(tmp_path / "cut"))
    tar = next(Path(path).glob("train-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-4096])
    with pytest.raises(InputError, match=r"train-0000\d.tar: \d+ bytes, but index.json says"):
        audit(path, tmp_path / "to")
    single = Manifest.load(pack_one(tmp_path / "single"))
    assert len(single.shards) == 1
    with pytest.raises(InputError, match="holds one image"):
        audit(str(tmp_path / "single"), tmp_path / "to2")
    with pytest.raises(InputError, match="points by pixels have no default threshold"):
        audit(points, tmp_path / "to", threshold=None)


def test_a_threshold_of_0_finds_what_is_equal(planted: str, tmp_path: Path) -> None:
    audit(planted, tmp_path, threshold=0.0)
    exact = {frozenset(line["key"] for line in group) for group in groups_in(tmp_path).values()}
    assert exact == {group for group in GROUPS if not group & {"train-011", "test-004"}}, "those without noise"


def test_images_are_numbered_by_split_and_shard(planted: str) -> None:
    some = Images(DataConfig(path=planted), "train", "test")
    numbers = [0, 1, 200, 460, 699, 700]
    for number, place in some.places(numbers).items():
        split, index = place.key.split("-")
        assert split == place.split
        assert np.array_equal(some.read(number, number + 1)[0].numpy(), image(split, int(index)))


def test_a_full_disk_is_one_sentence(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.tempfile, "TemporaryFile", lambda: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(InputError, match="set TMPDIR to a folder with more space"):
        audit(planted, tmp_path)


def test_too_many_pairs_are_refused(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_PAIRS", 50)
    with pytest.raises(InputError, match="pairs may be within the threshold: lower --threshold"):
        audit(planted, tmp_path, threshold=500.0)


def pack_one(folder: Path) -> str:
    pack(numbered(train=1, test=1), str(folder), shards=1, progress=False)
    content = json.loads((folder / "index.json").read_text())
    del content["splits"]["test"]
    (folder / "index.json").write_text(json.dumps(content))
    return str(folder)


def test_points_have_no_picture(points: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST", 4096)
    found = audit(points, tmp_path, threshold=1e-6)
    assert int(str(found["images"])) > 1000 and not (tmp_path / "groups.png").exists()
    with pytest.raises(
        InputError,
        match="--encoder mnist-cnn64 is for images, and these are points",
    ):
        audit(points, tmp_path, encoder="mnist-cnn64", threshold=1.0)
