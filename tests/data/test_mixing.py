"""Several data sets at once: exact shares of every round, and epochs of their own."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from naign.config import load
from naign.data.dataset import DataConfig
from naign.data.format.writer import pack
from naign.data.loader import Stream, read_split
from naign.data.mixing import DataSets, members, shares
from naign.errors import InputError
from tests.data.numbered import numbered
from tests.data.test_augment import broken


@pytest.fixture
def three(tmp_path: Path) -> str:
    """Data sets of 23, 9 and 40 images, the second in colour, with labels that they share in part."""
    for name, count, shape, labels in (
        ("a", 23, (1, 4, 4), ("even", "odd")),
        ("b", 9, (3, 4, 4), ("odd", "other")),
        ("c", 40, (1, 4, 4), ()),
    ):
        source = replace(numbered(count, 5, shape), name=name, labels=labels)
        pack(source, str(tmp_path / name), shards=3, progress=False)
    return f"[{tmp_path}/a, {{path: {tmp_path}/b, weight: 2}}, {{path: {tmp_path}/c, weight: 3.0}}]"


def take(path: str, rounds: int, world: int = 1, **settings: Any) -> tuple[list[list[str]], torch.Tensor, torch.Tensor]:
    """Keys by round, images and labels."""
    keys, images, labels = [], [], []
    with ExitStack() as stack:
        streams = [
            stack.enter_context(
                Stream(DataConfig(path=path, **settings), seed=2, round_size=24, rank=rank, world=world)
            )
            for rank in range(world)
        ]
        for round in range(rounds):
            taken = [stream.take(round) for stream in streams]
            keys.append([key for part in taken for key in part.keys])
            images += [part.images for part in taken]
            labels += [part.labels for part in taken]
    return keys, torch.cat(images), torch.cat(labels)


def test_every_round_has_exact_shares_and_every_data_set_its_own_epochs(three: str, tmp_path: Path) -> None:
    keys, images, labels = take(three, 23 * 9, trace=str(tmp_path / "trace"))
    assert all(Counter(key[0] for key in found) == {"0": 4, "1": 8, "2": 12} for found in keys)
    for source, count in (("0", 23), ("1", 9), ("2", 40)):
        mine = [key for found in keys for key in found if key[0] == source]
        whole = len(mine) // count * count
        assert set(Counter(mine[:whole]).values()) == {len(mine) // count}
        assert len({*mine[:count]}) == count  # each once before any comes again
    flat = [key for found in keys for key in found]
    lines = (tmp_path / "trace/rank-00000.txt").read_text().split()
    assert lines[2::3] == flat
    assert images.shape[1:] == (3, 4, 4)
    numbers = [int(key[-3:]) for key in flat]
    expected = {"0": lambda n: n % 2, "1": lambda n: 1 + n % 2, "2": lambda n: -1}
    assert labels.tolist() == [expected[key[0]](number) for key, number in zip(flat, numbers, strict=True)]
    assert [int(image[0, 0, 0]) for image in images] == numbers


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 0), (3, 2), (4, 1)])
def test_they_are_the_same_on_any_ranks_and_workers(three: str, world: int, workers: int) -> None:
    plain, other = take(three, 7), take(three, 7, world, workers=workers)
    assert plain[0] == other[0] and torch.equal(plain[1], other[1]) and torch.equal(plain[2], other[2])


def test_rounds_are_mixed_evenly(three: str) -> None:
    owners = [int(key[0]) for key in take(three, 1)[0][0]]
    for part in (owners[:12], owners[12:]):
        assert Counter(part) == {0: 2, 1: 4, 2: 6}


def test_evaluation_takes_of_each_what_it_has(three: str) -> None:
    assert len(read_split(three, "train")[0]) == 72 and len(read_split(three, "test")[0]) == 15
    _, labels = read_split(three, "train", limit=36)
    assert Counter((labels < 0).tolist()) == {True: 20, False: 16}
    manifest = DataSets(DataConfig(path=three)).manifest
    assert manifest.name == "a + b + c" and manifest.labels == ("even", "odd", "other")


def test_evaluation_passes_over_a_set_without_the_split(tmp_path: Path) -> None:
    pack(numbered(23, 5), str(tmp_path / "a"), shards=3, progress=False)
    source = numbered(9, 5)
    pack(replace(source, splits={"train": source.splits["train"]}), str(tmp_path / "b"), shards=2, progress=False)
    for path in (f"[{tmp_path}/a, {tmp_path}/b]", f"[{tmp_path}/b, {tmp_path}/a]"):
        assert len(read_split(path, "test")[0]) == 5 and len(read_split(path, "train")[0]) == 32


def test_what_stands_in_for_a_broken_sample_has_its_own_label_and_key(
    three: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, _, labels = take(three, 3)
    label_of = dict(zip(chain(*keys), labels.tolist(), strict=True))
    for shard in sorted((tmp_path / "b").glob("train-*.tar")):
        broken(str(tmp_path / "b"), shard.name, 0)
    monkeypatch.setattr("naign.data.loader.BROKEN", 0.5)
    keys, _, labels = take(three, 3, broken="skip")
    assert len({key for key in chain(*keys) if key.startswith("1:")}) == 6  # of nine
    assert all(label_of[key] == label for key, label in zip(chain(*keys), labels.tolist(), strict=True))


def test_a_configuration_lists_them(three: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data:\n  path:\n  - {tmp_path}/a\n  - path: {tmp_path}/b\n    weight: 2\n")
    config = load(str(tmp_path / "c.yaml"))
    assert [found.path for found in DataSets(config.data).configs] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert [member.weight for member in members(config.data)] == [1.0, 2.0]
    assert members(DataConfig(path="[a, {path: b, weight: 1e-9}]"))[1].weight == 1e-9  # which YAML reads as text


def test_shares_add_up() -> None:
    assert shares([1, 1, 1], 8) == [3, 3, 2] and shares([1, 2, 3], 24) == [4, 8, 12] and shares([5], 7) == [7]
    assert shares([0.1, 0.7, 0.2], 10) == [1, 7, 2] and shares([1e308, 1e308], 128) == [64, 64]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("[]", "write paths in brackets"),
        ("[{weight: 3}]", "has the entry {'weight': 3}"),
        ("[{path: <a>, weigth: 3}]", "unknown key 'weigth'; did you mean 'weight'"),
        ("[<a>, {path: <a>, weight: 0}]", "the weight 0.0: it must be a positive number"),
        ("[<a>, {path: <a>, weight: .nan}]", "the weight nan"),
        ("[<a>, {path: <a>, weight: many}]", "weight is 'many': it must be float"),
        (f"[<a>, {{path: <a>, weight: {10**400}}}]", "weight is 1000.*: it must be float"),
        ("[<a>, {path: <a>, weight: 0.001}]", "has no image in a round of 24: raise its weight"),
        ("[<a>, nowhere]", "nowhere: no data set here"),
        ("[<a>, <b>]", r"numbered \(1, 8, 8\) and numbered \(1, 4, 4\) do not go together"),
        ("[<a>, <b>", "is not a list"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, path: str, message: str) -> None:
    pack(numbered(), str(tmp_path / "a"), shards=2, progress=False)
    pack(numbered(shape=(1, 8, 8)), str(tmp_path / "b"), shards=2, progress=False)
    with pytest.raises(InputError, match=message):
        take(path.replace("<a>", f"{tmp_path}/a").replace("<b>", f"{tmp_path}/b"), 1)


def test_sizes_that_differ_are_brought_to_one(tmp_path: Path) -> None:
    pack(numbered(), str(tmp_path / "a"), shards=2, progress=False)
    pack(numbered(shape=(3, 8, 9)), str(tmp_path / "b"), shards=2, progress=False)
    assert take(f"[{tmp_path}/a, {tmp_path}/b]", 1, size="6")[1].shape == (24, 3, 6, 6)
