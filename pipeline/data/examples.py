"""What every source gives: keys, arrays and labels, by split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipeline.data.samples import Array

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
