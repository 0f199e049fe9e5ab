"""Near-duplicates: all that are planted and nothing else, whatever the blocks, and an index without them."""

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from naign.data.dataset import DataConfig
from naign.data.format.audit import verify
from naign.data.format.manifest import Manifest
from naign.data.format.writer import pack
from naign.data.loader import Stream, read_split
from naign.data.sources.source import Made
from naign.errors import InputError
from naign.neighbours import rows
from naign.neighbours.images import Images
from naign.neighbours.work import Work
from tests.data.numbered import edit_index, numbered, rewrite
from tests.neighbours.planted import GROUPS, TEST, TRAIN, audit, image, plant, small_blocks


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


def redundant_in(folder: Path) -> set[str]:
    return {line["key"] for group in groups_in(folder).values() for line in group if line["redundant"] == "1"}


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
        assert redundant == training if len(training) < len(lines) else len(redundant) == len(training) - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["duplicates.json", "groups.csv", "groups.png"]


def test_distances_are_those_of_brute_force(planted: str, tmp_path: Path) -> None:
    audit(planted, tmp_path, threshold=90.0)  # which random pairs are within as well
    every = [(f"{split}-{number:03d}", image(split, number).astype(float))
             for split, count in (("train", TRAIN), ("test", TEST)) for number in range(count)]  # fmt: skip
    stack = np.stack([pixels for _, pixels in every]).reshape(len(every), -1)
    mirrored = np.stack([pixels[..., ::-1] for _, pixels in every]).reshape(len(every), -1)
    near = {key: np.inf for key, _ in every}
    for at, (key, _) in enumerate(every):
        squares = np.minimum(((stack - stack[at]) ** 2).mean(1), ((stack - mirrored[at]) ** 2).mean(1))
        squares[at] = np.inf
        near[key] = float(np.sqrt(squares.min()))
    lines = [line for group in groups_in(tmp_path).values() for line in group]
    assert {line["key"] for line in lines} == {key for key, distance in near.items() if distance <= 90}
    assert len(lines) > 100
    assert all(float(line["distance"]) == pytest.approx(near[line["key"]], rel=1e-12) for line in lines)


def test_many_copies_of_one_image_are_all_pairs(tmp_path: Path) -> None:
    source = numbered(train=60, test=5)
    train = Made(length=60, make=lambda index: (f"train-{index}", np.full((1, 4, 4), index // 30, np.uint8), 0))
    source = replace(source, splits=dict(source.splits) | {"train": train})
    pack(source, str(tmp_path / "data"), shards=3, progress=False)
    found = audit(str(tmp_path / "data"), tmp_path / "to", threshold=0.5)
    assert found["pairs"] == 2 * len(list(combinations(range(30), 2))) and found["groups"] == 2
    assert found["redundant"] == 58


@pytest.mark.parametrize("after", [0, 2, 5])
def test_an_interrupted_audit_goes_on(after: int, planted: str, tmp_path: Path, monkeypatch) -> None:
    audit(planted, tmp_path / "whole")
    keep, kept = Work.keep, list[str]()

    def counted(self: Work, part: str, tensor: torch.Tensor) -> None:
        if len(kept) == after:
            raise KeyboardInterrupt
        kept.append(part)
        keep(self, part, tensor)

    monkeypatch.setattr(Work, "keep", counted)
    with pytest.raises(KeyboardInterrupt):
        audit(planted, tmp_path / "cut")
    again = list[str]()
    monkeypatch.setattr(Work, "keep", lambda self, part, tensor: again.append(part) or keep(self, part, tensor))
    with pytest.raises(InputError, match="interrupted there: delete what it left there with --force, or name"):
        audit(planted, tmp_path / "cut", threshold=9.0)
    audit(planted, tmp_path / "cut")
    assert len(kept) == after and not set(kept) & set(again) and len(kept + again) == 6
    for name in ("groups.csv", "groups.png", "duplicates.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").glob("work*"))


def test_force_gives_up_an_interrupted_audit(planted: str, digits: str, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("naign.neighbours.duplicates.compare", lambda *_, **options: 1 / 0)
        audit(planted, tmp_path)
    for path, threshold in ((planted, 9.0), (digits, None)):
        with pytest.raises(InputError, match="other data, model or options"):
            audit(path, tmp_path, threshold=threshold)
    audit(planted, tmp_path, threshold=9.0, force=True)
    assert not list(tmp_path.glob("work*"))


def taken(config: DataConfig, world: int, rounds: int) -> Counter[str]:
    """How often each key is taken, over all ranks."""
    keys = Counter[str]()
    for rank in range(world):
        with Stream(config, seed=1, round_size=12, rank=rank, world=world, prefetch=False) as stream:
            keys.update(key for number in range(rounds) for key in stream.take(number).keys)
    return keys


@pytest.mark.parametrize("shuffle", [1, 3])
def test_an_index_without_them_is_trained_on_exactly(shuffle: int, planted: str, tmp_path: Path) -> None:
    found = audit(planted, tmp_path / "to", drop=str(tmp_path / "thin"))
    manifest = Manifest.load(str(tmp_path / "thin"))
    left_out = redundant_in(tmp_path / "to")
    assert manifest.split("train").samples == TRAIN - len(left_out) == TRAIN - int(str(found["redundant"])) == 694
    assert manifest.split("test").samples == TEST and not any(key.startswith("test") for key in left_out)
    config = DataConfig(path=planted, index=str(tmp_path / "thin"), shuffle=shuffle)
    epoch = {f"train-{number:03d}": 1 for number in range(TRAIN)}
    for key in left_out:
        del epoch[key]
    first = taken(config, 1, 57)  # 684 of 694
    assert len(first) == 684 and set(first.values()) == {1} and set(first) <= set(epoch)
    whole = taken(config, 1, 174)  # 2088 of three epochs, 2082
    assert sum(whole.values()) == 2088 and set(whole.values()) <= {3, 4} and set(whole) == set(epoch)
    assert taken(config, 3, 174) == whole
    images, _ = read_split(config, "train")
    assert len(images) == 694 and verify(planted, index=str(tmp_path / "thin")).samples == 694 + TEST
    with pytest.raises(
        InputError, match=rf"no shard of index.json is there: .* naign verify SHARDS --index {tmp_path}/thin$"
    ):
        verify(str(tmp_path / "thin"))
    some = Images(config, "train", "test")
    numbers = [0, 1, 200, 460, 693, 694]
    keys = {number: place.key for number, place in some.places(numbers).items()}
    for number in numbers:
        split, index = keys[number].split("-")
        assert np.array_equal(some.read(number, number + 1)[0].numpy(), image(split, int(index)))
    thin, more = str(tmp_path / "thin"), str(tmp_path / "thinner")
    again = audit(planted, tmp_path / "again", index=thin, drop=more, threshold=85.0)
    assert again["images"] == 694 + TEST
    thinner = Manifest.load(str(tmp_path / "thinner")).split("train").samples
    assert thinner == 694 - int(str(again["redundant"])) < 694
    config = DataConfig(path=planted, index=more, shuffle=shuffle)
    assert set(taken(config, 1, thinner // 12 + 1)) == set(epoch) - redundant_in(tmp_path / "again")


def test_known_broken_images_are_no_duplicates(planted: str, tmp_path: Path) -> None:
    path = plant(str(tmp_path / "data"))
    manifest = Manifest.load(path)
    shard = manifest.split("train").shards[0].name
    images = Images(DataConfig(path=path), "train")
    key = images.places([0])[0].key
    rewrite(path, shard, lambda members: [(name, b"" if name == f"{key}.png" else data) for name, data in members])
    with pytest.raises(InputError, match=f"key {key}: the .png cannot be decoded"):
        audit(path, tmp_path / "to")
    edit_index(path, broken={shard: [key]})
    audit(path, tmp_path / "to", force=True)
    found = {frozenset(line["key"] for line in group) for group in groups_in(tmp_path / "to").values()}
    assert found == {group - {key} for group in GROUPS if len(group - {key}) > 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "--threshold is -1.0: it must be 0 or more"),
        ({"threshold": float("inf")}, "--threshold is inf: it must be 0 or more, below 1e6"),
        ({"threshold": None, "encoder": "digits-cnn64"}, "--encoder 'digits-cnn64' reads"),
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


def test_an_index_that_is_read_is_not_replaced(planted: str, tmp_path: Path) -> None:
    path, thin = plant(str(tmp_path / "data")), str(tmp_path / "thin")
    audit(path, tmp_path / "to", drop=thin)
    (tmp_path / "link").symlink_to(path)
    before = (Path(path) / "index.json").read_bytes()
    for index, drop in (("", f"{path}/../data"), ("", str(tmp_path / "link")), (thin, path), (thin, f"{thin}/.")):
        with pytest.raises(InputError, match="holds this index already: give another folder$"):
            audit(path, tmp_path / "to", index=index, drop=drop, force=True)
    assert (Path(path) / "index.json").read_bytes() == before


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
    for drop, message in ((planted, "this index already: give another folder$"), (points, "or replace it by --force")):
        with pytest.raises(InputError, match=message):
            audit(planted, tmp_path / "to", drop=drop)
    with pytest.raises(InputError, match="points by pixels have no default threshold"):
        audit(points, tmp_path / "to", threshold=None)


def test_only_an_audits_own_files_are_deleted(planted: str, tmp_path: Path) -> None:
    others = ["work-00000.tar", "work-notes.txt", "work-0123.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    audit(planted, tmp_path)
    assert [(tmp_path / name).read_text() for name in others] == ["mine"] * 3
    (tmp_path / "work.json").write_text('{"my": 1}')
    with pytest.raises(InputError, match="work.json is of no audit: name another folder by --to"):
        audit(planted, tmp_path, force=True)
    assert (tmp_path / "work.json").exists()


def test_a_damaged_part_is_named(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("naign.neighbours.duplicates.compare", lambda *_, **options: 1 / 0)
        audit(planted, tmp_path)
    part = next(tmp_path.glob("work-*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{part.name} is damaged: delete it, and run the same command again"):
        audit(planted, tmp_path)
    part.unlink()
    audit(planted, tmp_path)
    assert not list(tmp_path.glob("work*"))


def test_a_refused_index_leaves_earlier_results(planted: str, tmp_path: Path) -> None:
    audit(planted, tmp_path / "to")
    before = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}
    with pytest.raises(InputError, match="no image of the split train would be left"):
        audit(planted, tmp_path / "to", threshold=500.0, drop=str(tmp_path / "drop"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == before
    assert not (tmp_path / "drop").exists()
    audit(planted, tmp_path / "to", threshold=0.0)
    exact = {frozenset(line["key"] for line in group) for group in groups_in(tmp_path / "to").values()}
    assert exact == {group for group in GROUPS if not group & {"train-011", "test-004"}}, "those without noise"


def test_too_many_pairs_are_refused(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_PAIRS", 50)
    with pytest.raises(InputError, match="are within the threshold: lower --threshold"):
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
    with pytest.raises(InputError, match="--encoder mnist-cnn64 is for images, and these are points"):
        audit(points, tmp_path, encoder="mnist-cnn64", threshold=1.0)


@pytest.mark.parametrize("places", [[3, 1], [2, 2], [-1], [True], [10**6], [], "1"])
def test_an_index_that_leaves_out_what_is_not_there_is_malformed(places: object, planted: str, tmp_path: Path) -> None:
    shutil.copytree(planted, tmp_path / "data")
    shard = Manifest.load(planted).split("train").shards[0].name
    for without in ({shard: places}, {"none.tar": [1]}, [places]):
        edit_index(str(tmp_path / "data"), without=without)
        with pytest.raises(InputError, match="malformed"):
            Manifest.load(str(tmp_path / "data"))
