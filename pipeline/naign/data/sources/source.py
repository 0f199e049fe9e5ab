"""What every source gives: keys, arrays and labels, by split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from naign.data.decode import Array
from naign.data.order import shuffled
from naign.errors import InputError

SUBSET = 2  # stream of random numbers that neither packing nor toys have: with theirs it would be an order, not chance

Example = tuple[str, Array, int]  # key, array, label (-1 for none)


class BrokenPicture(InputError):
    """The bytes of an example are not those of a picture: it is left out."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Made:
    """`length` examples, each made by `make(index)` when asked for: a large folder is never in memory at once. Packing
    leaves out those for which `make` raises BrokenPicture.
    """

    length: int
    make: Callable[[int], Example]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index >= self.length:
            raise IndexError(index)
        return self.make(index)


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """A data set before packing."""

    name: str
    kind: str = "image"  # (C, H, W) uint8; `point`: (D,) float32
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    splits: dict[str, Made]


def labelled(keys: Sequence[str], arrays: Array, labels: Array) -> Made:
    """The examples of an array, with their keys and labels."""

    def make(row: int) -> Example:
        return keys[row], arrays[row], int(labels[row])

    return Made(length=len(keys), make=make)


def numbered(split: str, arrays: Array, labels: Array) -> Made:
    """The examples of an array, whose keys are the split and a number."""
    keys = [f"{split}-{row:05d}" for row in range(len(arrays))]
    return labelled(keys, arrays, labels)


def subset(source: Source, count: int, *, seed: int = 0) -> Source:
    """The source with `count` training examples, drawn by the seed; its test split is whole. InputError for too few."""
    whole = source.splits["train"]
    if not 1 <= count <= len(whole):
        raise InputError(f"{source.name} has {len(whole)} training examples: ask for 1 to so many, not for {count}")
    rows = sorted(shuffled(len(whole), seed, SUBSET)[:count])
    few = replace(whole, length=count, make=lambda index: whole[rows[index]])
    return replace(source, splits={**source.splits, "train": few})
