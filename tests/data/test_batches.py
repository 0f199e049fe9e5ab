"""`naign.open_dataset`: every image once an epoch for any number of ranks and any batch, from any state."""

import json
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from naign import open_dataset
from naign.data.format.indexing import index
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.reader import Reader
from naign.data.scale import scaled
from tests.data.numbered import numbered
from tests.refused import refused


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """23 images in three shards."""
    folder = str(tmp_path_factory.mktemp("small"))
    pack(numbered(), folder, shards=3)
    return folder


def keys(batches):
    return [key for batch in batches for key in batch.keys]


def test_a_batch_has_images_in_the_scale_of_the_model_labels_and_keys(small):
    (batch,) = open_dataset(Path(small), "test", batch=5)
    images, labels, names = batch
    stored, numbers = read_split(small, "test")
    places = [int(name.removeprefix("test-")) for name in names]
    order = stored[:, 0, 0, 0].tolist()
    rows = [order.index(place) for place in places]
    assert torch.equal(images, scaled(stored[rows]))
    assert torch.equal(labels, numbers[rows])
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert -1 <= images.min() < images.max() <= 1


@pytest.mark.parametrize(
    "batch, world",
    [
        (1, 1),
        (7, 3),
        (8, 8),
        (30, 4),
    ],
)
def test_every_image_comes_once_an_epoch_and_ranks_have_equally_many_batches(small, batch, world):
    whole = keys(open_dataset(small, batch=1))
    ranks = [
        open_dataset(
            small,
            batch=batch,
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]
    for epoch in range(2):
        found = []
        for batches in zip(*ranks, strict=True):
            found += keys(batches)
        assert len(found) == 23
        assert set(found) == set(whole)
        if epoch == 0:
            assert found == whole  # the same order
        for rank in ranks:
            assert rank.state_dict() == ranks[0].state_dict()
            assert rank.epoch == epoch + 1


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("stop", [1, 2, 6])
def test_a_state_is_resumed_with_other_ranks_and_another_batch(small, stop, workers):
    whole = keys(open_dataset(small))
    before = []
    for rank in (0, 1):
        dataset = open_dataset(
            small,
            batch=4,
            rank=rank,
            world=2,
            workers=workers,
        )
        before += keys(islice(dataset, stop))
        state = json.loads(json.dumps(dataset.state_dict()))
    for world, size in (
        (1, 4),
        (2, 4),
        (3, 5),
        (8, 10),
    ):
        after = []
        for rank in range(world):
            dataset = open_dataset(
                small,
                batch=size,
                rank=rank,
                world=world,
            )
            dataset.load_state_dict(state)
            after += keys(dataset)
            assert dataset.epoch == 1
        assert sorted(before + after) == sorted(whole)


def test_an_iteration_that_was_left_is_continued(small):
    dataset = open_dataset(small, batch=4)
    first = next(iter(dataset))
    assert set(first.keys) | set(keys(dataset)) == set(keys(open_dataset(small)))
    assert keys(dataset) != keys(open_dataset(small))  # the next epoch has another order
    assert dataset.epoch == 2


def test_the_types_of_settings(small):
    dataset = open_dataset(
        small,
        size=12,
        index=Path(small),
        batch=torch.tensor(7).numpy()[()],
    )
    assert dataset.shape == (1, 12, 12)
    next(iter(dataset))
    dataset.load_state_dict(dataset.state_dict())


def images_of(dataset):
    return torch.cat([batch.images for batch in dataset])


def test_mirroring_and_windows_depend_on_the_seed_alone(digits):
    options = {"flip": True, "crop": 6}
    whole = images_of(open_dataset(digits, batch=500, **options))
    dataset = open_dataset(
        digits,
        batch=100,
        workers=2,
        **options,
    )
    dataset.load_state_dict({**dataset.state_dict(), "position": 1000})
    rest = images_of(dataset)
    assert whole.shape[1:] == (1, 6, 6)
    assert torch.equal(rest, whole[1000:])
    other = images_of(
        open_dataset(
            digits,
            batch=500,
            seed=1,
            **options,
        )
    )
    assert not torch.equal(other, whole)


def test_points_and_tars_by_others_are_read_from_s3(points, small, bucket):
    (first, *_) = open_dataset(points, batch=64)
    assert first.images.shape == (64, 2)
    assert first.images.dtype == torch.float32
    assert set(first.labels.tolist()) != {-1}
    pack(numbered(), f"{bucket}/shards", shards=3)
    index(f"{bucket}/shards", to=f"{bucket}/index")
    there = open_dataset(f"{bucket}/shards", batch=5, index=f"{bucket}/index")
    assert sorted(keys(there)) == sorted(keys(open_dataset(small)))


def test_loaders_of_torch_and_torchdata(small):
    whole = keys(open_dataset(small, batch=4))
    assert keys(DataLoader(open_dataset(small, batch=4), batch_size=None)) == whole
    with refused("num_workers=0"):
        next(iter(DataLoader(open_dataset(small, batch=4), batch_size=None, num_workers=1)))
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    loader = stateful(open_dataset(small, batch=4), batch_size=None)
    assert keys(islice(loader, 2)) == whole[:8]
    state = loader.state_dict()
    resumed = stateful(open_dataset(small, batch=4), batch_size=None)
    resumed.load_state_dict(state)
    assert keys(resumed) == whole[8:]
    assert sorted(keys(resumed)) == sorted(whole)  # the next epoch


@pytest.mark.parametrize("dispatch", [True, False])
def test_a_second_division_by_accelerate_is_refused(small, dispatch):
    loader = DataLoader(
        open_dataset(
            small,
            batch=8,
            rank=0,
            world=2,
        ),
        batch_size=None if dispatch else 4,
    )
    loader = prepare_data_loader(
        loader, torch.device("cpu"), 2, 0, put_on_device=True, dispatch_batches=dispatch, even_batches=False
    )
    with refused("once more"):
        next(iter(loader))


@pytest.mark.parametrize(
    "options, part",
    [
        ({"path": "[a, b]"}, "no data set here"),
        ({"split": "val"}, "no split 'val', only train, test"),
        ({"batch": 0}, "batch is 0"),
        ({"rank": 0}, "both rank and world"),
        ({"batch": 2, "rank": 0, "world": 3}, "none for some of 3 ranks"),
        ({"batch": 99, "rank": 0, "world": 24}, r"23 images left .* too few for 24 ranks.*'epoch': 1, 'position': 0"),
        ({"workers": "two"}, "workers is 'two': it must be int"),
        ({"rank": "0", "world": 2}, "rank '0' and world 2: they must be whole numbers"),
    ],
)
def test_wrong_arguments_are_refused(small, options, part):
    with refused(part):
        next(iter(open_dataset(**{"path": small, **options})))


@pytest.mark.parametrize(
    "state, part",
    [
        ({}, "another data set"),
        ({"position": 24}, "another data set"),
        ({"seed": 1}, "with seed 0"),
        ({"order": "0"}, "another data set, split, shuffle or seed"),
    ],
)
def test_the_state_of_another_data_set_or_seed_is_refused(small, state, part):
    dataset = open_dataset(small, batch=4)
    next(iter(dataset))
    before = dataset.state_dict()
    with refused(part):
        dataset.load_state_dict({**before, **state} if state else {})
    with refused("another data set"):
        dataset.load_state_dict([])
    other = open_dataset(small, "test")
    with refused("than split train of"):
        dataset.load_state_dict(other.state_dict())
    assert dataset.state_dict() == before


def test_a_batch_in_work_is_waited_for(small, monkeypatch):
    """A thread that is inside torch when the interpreter ends would abort it."""
    decode = Reader.row
    begun = []
    ended = []

    def slow(reader, raw, *rest):
        begun.append(raw.sample["__key__"])
        time.sleep(0.05)
        ended.append(raw.sample["__key__"])
        return decode(reader, raw, *rest)

    monkeypatch.setattr(Reader, "row", slow)
    for _ in open_dataset(small, batch=4):
        break
    assert begun == ended
    assert len(ended) >= 4
