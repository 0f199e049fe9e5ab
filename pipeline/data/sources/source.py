"""What every source gives: keys, arrays and labels, by split."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pipeline.data.decode import Array
from pipeline.errors import InputError

Example = tuple[str, Array, int]
"""Key, array, label (-1 for none)."""


class Examples(Protocol):
    """The examples of a split, made when asked for, so that a large folder is never in memory at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """A data set before packing."""

    name: str
    kind: str
    """`image`: (C, H, W) uint8; `point`: (D,) float32."""
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    splits: dict[str, Examples]


@dataclass(kw_only=True, slots=True, frozen=True)
class Made:
    """`length` examples, each made by `make(index)`."""

    length: int
    make: Callable[[int], Example]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index >= self.length:
            raise IndexError(index)
        return self.make(index)


def subset(
    source: Source,
    *,
    train: int | None = None,  # training examples to keep; None: all
    without: tuple[str, ...] = (),  # labels to leave out of the training split
    seed: int = 0,  # which are kept: the first of an order drawn by it
) -> Source:
    """The source with fewer training examples, its test split whole. Raises InputError where too few are left."""
    unknown = [label for label in without if label not in source.labels]
    if unknown:
        raise InputError(f"{source.name} has no label {unknown[0]!r}: --without takes {', '.join(source.labels)}")
    if train is not None and train < 1:
        raise InputError(f"--train is {train}: it must be at least 1")
    whole = source.splits["train"]
    numbers = [source.labels.index(label) for label in without]
    # Of a key that neither packing nor toys have: the same numbers twice would be an order, not chance.
    order = np.argsort(np.random.Philox(key=np.array([seed, 2], np.uint64)).random_raw(len(whole)), kind="stable")
    kept = np.array([row for row in order if not numbers or whole[int(row)][2] not in numbers], dtype=np.int64)
    if len(kept) < (train or 1):
        raise InputError(f"{source.name} has {len(kept)} such training examples, fewer than the {train or 1} asked for")
    kept = np.sort(kept[:train])
    few = Made(length=len(kept), make=lambda index: whole[int(kept[index])])
    return replace(source, splits={**source.splits, "train": few})
