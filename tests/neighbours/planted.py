"""A data set of unlike images in which copies are planted, and blocks so small that there are many."""

import csv

import numpy as np

from naign.data.format.writer import pack
from naign.data.sources.source import Made, Source
from naign.neighbours import rows
from tests.data.numbered import noise

TRAIN = 700
TEST = 90
SHAPE = (3, 8, 8)
COPIES = {  # what each planted image is: the original, mirrored or not, and its noise in levels
    ("train", 5): ("train", 640, False, 0),
    ("train", 6): ("train", 640, False, 0),  # three alike
    ("train", 9): ("train", 300, True, 0),
    ("train", 11): ("train", 310, False, 3),
    ("test", 3): ("train", 20, False, 0),
    ("test", 4): ("train", 21, True, 3),
    ("test", 7): ("test", 60, True, 0),
}


def image(split, index):
    if (split, index) not in COPIES:
        return noise((split == "test", index), SHAPE)
    other, number, mirrored, levels = COPIES[split, index]
    original = image(other, number).astype(int)
    draw = np.random.default_rng((split == "test", index))
    noisy = original + draw.integers(-levels, levels + 1, SHAPE)
    copy = np.clip(noisy, 0, 255).astype(np.uint8)
    if mirrored:
        return copy[..., ::-1]
    return copy


def plant(path):
    def split(name, length):
        def make(index):
            return f"{name}-{index:03d}", image(name, index), index % 2

        return Made(length=length, make=make)

    source = Source(
        name="planted",
        kind="image",
        shape=SHAPE,
        labels=("even", "odd"),
        splits={"train": split("train", TRAIN), "test": split("test", TEST)},
    )
    pack(source, path, shards=5)
    return path


def small_blocks(patch):
    """Blocks of 256 images, and two of them in a group of queries."""
    patch.setattr(rows, "MOST", 256)
    patch.setattr(rows, "ASKED", 2 * 2 * 192 * 256)


def read_csv(file):
    return list(csv.DictReader(file.read_text().splitlines()))
