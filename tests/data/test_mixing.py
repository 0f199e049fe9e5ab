"""Several data sets at once: exact shares of every round, and epochs of their own."""

from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch

from naign.config import load
from naign.data.dataset import DataConfig
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.mixing import DataSets, members, shares
from tests.data.numbered import numbered, streams_of
from tests.data.test_augment import broken
from tests.refused import refused


@pytest.fixture
def three(tmp_path):
    """Data sets of 23, 9 and 40 images, the second in colour, with labels that they share in part."""
    for name, count, shape, labels in (
        ("a", 23, (1, 4, 4), ("even", "odd")),
        ("b", 9, (3, 4, 4), ("odd", "other")),
        ("c", 40, (1, 4, 4), ()),
    ):
        source = replace(
            numbered(count, 5, shape),
            name=name,
            labels=labels,
        )
        pack(source, str(tmp_path / name), shards=3)
    return f"[{tmp_path}/a, {{path: {tmp_path}/b, weight: 2}}, {{path: {tmp_path}/c, weight: 3.0}}]"


def take(path, rounds, world=1, **settings):
    """Rounds of 24 images, put together from the ranks, and all images."""
    lines = []
    images = []
    config = DataConfig(path=path, **settings)
    with streams_of(config, seed=2, each=24, world=world) as streams:
        for round in range(rounds):
            found = []
            for stream in streams:
                taken = stream.take(round)
                images.append(taken.images)
                found += zip(
                    taken.keys,
                    taken.labels.tolist(),
                    strict=True,
                )
            lines.append(found)
    return lines, torch.cat(images)


def shares_of(lines):
    """How many images there are of each data set."""
    return Counter(key[0] for key, _ in lines)


def test_every_round_has_exact_shares_and_every_data_set_its_own_epochs(three, tmp_path):
    rounds, images = take(
        three,
        23 * 9,
        trace=f"{tmp_path}/trace",
    )
    for lines in rounds:
        assert shares_of(lines) == {"0": 4, "1": 8, "2": 12}
    flat = list(chain(*rounds))
    for source, count in (
        ("0", 23),
        ("1", 9),
        ("2", 40),
    ):
        mine = [key for key, _ in flat if key[0] == source]
        for begin in range(0, len(mine) - count + 1, count):
            assert len({*mine[begin : begin + count]}) == count  # each once before any comes again
    traced = (tmp_path / "trace/rank-00000.txt").read_text().split()
    assert traced[2::3] == [key for key, _ in flat]
    assert images.shape[1:] == (3, 4, 4)
    for (key, label), image in zip(flat, images, strict=True):
        number = int(key[-3:])
        assert image[0, 0, 0] == number
        labels = {"0": number % 2, "1": 1 + number % 2, "2": -1}
        assert label == labels[key[0]]
    for half in (flat[:12], flat[12:24]):  # evenly mixed
        assert shares_of(half) == {"0": 2, "1": 4, "2": 6}


@pytest.mark.parametrize("world, workers", [(3, 2), (4, 0)])
def test_they_are_the_same_on_any_ranks_and_workers(three, world, workers):
    plain, images = take(three, 7)
    lines, same = take(
        three,
        7,
        world,
        workers=workers,
    )
    assert plain == lines
    assert torch.equal(images, same)


def test_evaluation_takes_of_each_what_it_has(three):
    assert len(read_split(three, "train")[0]) == 72
    assert len(read_split(three, "test")[0]) == 15
    _, labels = read_split(three, "train", limit=36)
    assert int((labels < 0).sum()) == 20
    manifest = DataSets(DataConfig(path=three)).manifest
    assert manifest.name == "a + b + c"
    assert manifest.labels == ("even", "odd", "other")


def test_evaluation_passes_over_a_set_without_the_split(tmp_path):
    pack(
        numbered(23, 5),
        f"{tmp_path}/a",
        shards=3,
    )
    source = numbered(9, 5)
    train = {"train": source.splits["train"]}
    pack(
        replace(source, splits=train),
        f"{tmp_path}/b",
        shards=2,
    )
    for path in (f"[{tmp_path}/a, {tmp_path}/b]", f"[{tmp_path}/b, {tmp_path}/a]"):
        assert len(read_split(path, "test")[0]) == 5
        assert len(read_split(path, "train")[0]) == 32


def test_what_replaces_a_broken_sample_has_its_own_label_and_key(three, tmp_path, monkeypatch):
    rounds, _ = take(three, 3)
    label_of = dict(chain(*rounds))
    for shard in (tmp_path / "b").glob("train-*.tar"):
        broken(f"{tmp_path}/b", shard.name, 0)
    monkeypatch.setattr("naign.data.loader.BROKEN", 0.5)
    rounds, _ = take(three, 3, broken="skip")
    found = dict(chain(*rounds))
    assert sum(key.startswith("1:") for key in found) == 6  # of nine
    for key, label in found.items():
        assert label_of[key] == label


def test_a_configuration_lists_them(three, tmp_path):
    (tmp_path / "c.yaml").write_text(f"data:\n  path:\n  - {tmp_path}/a\n  - path: {tmp_path}/b\n    weight: 2\n")
    found = members(load(f"{tmp_path}/c.yaml").data)
    for member, name, weight in zip(found, "ab", (1.0, 2.0), strict=True):
        assert member.path == f"{tmp_path}/{name}"
        assert member.weight == weight
    assert members(DataConfig(path="[a, {path: b, weight: 1e-9}]"))[1].weight == 1e-9  # which YAML reads as text


def test_shares_add_up():
    assert shares([1, 2, 3], 24) == [4, 8, 12]
    assert shares([0.1, 0.7, 0.2], 10) == [1, 7, 2]
    assert shares([1e308, 1e308], 128) == [64, 64]


@pytest.mark.parametrize(
    "path, message",
    [
        ("[]", "write paths in brackets"),
        ("[{weight: 3}]", "has the entry {'weight': 3}"),
        ("[{path: <a>, weigth: 3}]", "unknown key 'weigth'; did you mean 'weight'"),
        ("[<a>, {path: <a>, weight: 0}]", "the weight 0.0: it must be a positive number"),
        ("[<a>, {path: <a>, weight: 0.001}]", "has no image in a round of 24: raise its weight"),
        ("[<a>, nowhere]", "nowhere: no data set here"),
        ("[<a>, <b>]", r"numbered \(1, 8, 8\) and numbered \(1, 4, 4\) do not go together"),
        ("[<a>, <b>", "is not a list"),
    ],
)
def test_malformed_lists(tmp_path, path, message):
    pack(
        numbered(),
        f"{tmp_path}/a",
        shards=2,
    )
    pack(
        numbered(shape=(1, 8, 8)),
        f"{tmp_path}/b",
        shards=2,
    )
    with refused(message):
        take(path.replace("<a>", f"{tmp_path}/a").replace("<b>", f"{tmp_path}/b"), 1)


def test_sizes_that_differ_are_brought_to_one(tmp_path):
    pack(
        numbered(),
        f"{tmp_path}/a",
        shards=2,
    )
    pack(
        numbered(shape=(3, 8, 9)),
        f"{tmp_path}/b",
        shards=2,
    )
    _, images = take(f"[{tmp_path}/a, {tmp_path}/b]", 1, size="6")
    assert images.shape == (24, 3, 6, 6)
