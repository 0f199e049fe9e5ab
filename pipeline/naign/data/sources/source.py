"""What every source gives: keys, arrays and labels, by split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from naign.data.decode import Array
from naign.data.order import shuffled
from naign.errors import InputError

Example = tuple[str, Array, int]  # key, array, label (-1 for none)


@dataclass(kw_only=True, slots=True, frozen=True)
class Made:
    """`length` examples, each made by `make(index)` when asked for: a large folder is never in memory at once."""

    length: int
    make: Callable[[int], Example]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index >= self.length:
            raise IndexError(index)
        return self.make(index)


def labelled(keys: Sequence[str], arrays: Array, labels: Array) -> Made:
    """The examples of an array, with their keys and labels."""
    return Made(length=len(keys), make=lambda row: (keys[row], arrays[row], int(labels[row])))


def train_and_test(train: tuple[Array, Array], test: tuple[Array, Array]) -> dict[str, Made]:
    """The splits of arrays of examples and of labels; the keys are numbered."""
    splits = {"train": train, "test": test}
    return {name: labelled([f"{name}-{row:05d}" for row in range(len(of[0]))], *of) for name, of in splits.items()}


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """A data set before packing."""

    name: str
    kind: str  # `image`: (C, H, W) uint8; `point`: (D,) float32
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    splits: dict[str, Made]


def subset(source: Source, *, train: int | None = None, without: tuple[str, ...] = (), seed: int = 0) -> Source:
    """The source with `train` training examples (None: all), drawn by the seed, and none of the labels `without`; its
    test split is whole. Raises InputError where too few are left.
    """
    if unknown := [label for label in without if label not in source.labels]:
        raise InputError(f"{source.name} has no label {unknown[0]!r}: --without takes {', '.join(source.labels)}")
    if train is not None and train < 1:
        raise InputError(f"{source.name}:{train}: give at least 1, the number of training examples to keep")
    whole = source.splits["train"]
    left_out = {source.labels.index(label) for label in without}
    # Of a stream that neither packing nor toys have: the same numbers twice would be an order, not chance.
    kept = [row for row in shuffled(len(whole), seed, 2) if not left_out or whole[row][2] not in left_out]
    if len(kept) < (train or 1):
        raise InputError(f"{source.name} has {len(kept)} such training examples, fewer than the {train or 1} asked for")
    kept = sorted(kept[:train])
    few = Made(length=len(kept), make=lambda index: whole[kept[index]])
    return replace(source, splits={**source.splits, "train": few})
