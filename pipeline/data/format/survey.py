"""What the samples of tars by others are: kind, shape, labels, found while they are read."""

import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.data.decode import decode_image, decoding, header_shape
from pipeline.data.format.labels import label_text
from pipeline.data.format.manifest import FORMS, Manifest
from pipeline.data.format.shards import Shard, is_count
from pipeline.data.sample import SUFFIXES
from pipeline.errors import InputError

log = logging.getLogger("naign.data")

MOST_LABELS = 1_000_000  # a larger number in .cls is no label, and more texts are no classes
_BROKEN = "repack the data set, or index it with --keep-broken and train with --data.broken=skip"
_ALIKE = "all samples must be alike; `naign pack folder` makes them so"


@dataclass(kw_only=True)
class Survey:
    """What samples are, of which all must be of one kind, and labelled or not."""

    label: str = ""
    """Where labels are, see sample.label_text."""
    check: int | None = None
    """So many samples are decoded, of others the header is read; None: all are."""
    keep_broken: bool = False
    kind: str = ""
    shape: tuple[int, ...] = ()
    """Of pictures that differ in size (C, 0, 0)."""
    seen: int = 0
    labelled: bool | None = None
    classes: int = 0
    """One more than the largest number in .cls."""
    texts: set[str] = field(default_factory=set)
    """The labels, where they are not numbers in .cls."""
    broken: list[str] = field(default_factory=list)
    """Keys of samples that cannot be decoded, which keep_broken lets pass."""

    def anew(self) -> "Survey":
        """One with these settings that has seen nothing."""
        return Survey(label=self.label, check=self.check, keep_broken=self.keep_broken)

    def holds(self, settings: "Survey") -> bool:
        """Whether one with these settings would have found the same."""
        same = (self.label, self.check) == (settings.label, settings.check)
        return same and (settings.keep_broken or not self.broken)

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> "Survey":
        """From its fields as JSON. Raises TypeError, KeyError or ValueError for what is none."""
        lists = all(type(record[name]) is list for name in ("shape", "texts", "broken"))
        if not lists or {*map(type, (*record["texts"], *record["broken"]))} - {str}:
            raise TypeError("shape, texts and broken are lists, the latter two of texts")
        found = replace(cls(**record), shape=tuple(record["shape"]), texts=set(record["texts"]))
        if not found._sound():
            raise ValueError("no survey finds that")
        return found

    def _sound(self) -> bool:
        """Whether what it has found are values that `see` can leave."""
        if not is_count(self.seen) or not is_count(self.classes) or max(self.classes, len(self.texts)) > MOST_LABELS:
            return False
        if {type(self.keep_broken), type(self.labelled)} - {bool, type(None)} or self.keep_broken is None:
            return False
        if not self.labelled and (self.classes or self.texts):
            return False
        if self.kind == "":  # all are broken
            return self.shape == () and self.labelled is None
        lengths = self.shape[:1] if self.kind == "image" and self.shape[1:] == (0, 0) else self.shape
        return len(self.shape) == FORMS[self.kind][1] and all(is_count(length, 1) for length in lengths)

    def see(self, sample: dict[str, Any], where: str) -> None:
        """Take account of a sample. Raises InputError where it is unlike the others or cannot be decoded."""
        self.seen += 1
        try:
            kind, shape = _form(sample, where, whole=self.check is None or self.seen <= self.check)
        except InputError as error:
            if not self.keep_broken:
                raise
            log.warning("kept: %s", error)
            self.broken.append(sample["__key__"])
            return
        self._agree(kind, shape, where)
        text = label_text(sample, self.label, where)
        if text is None:
            self._mark(False, where)
        elif self.label:
            self.texts.add(text)
            if len(self.texts) > MOST_LABELS:
                raise InputError(f"{where}: the {MOST_LABELS + 1}th label: --label {self.label} gives no classes")
            self._mark(True, where)
        else:
            number = int(text) if text.isdecimal() and len(text) < 19 else -1
            if number < 0:
                said = f"{where}: label {text[:20]!r} is none that .cls can hold, a number"
                raise InputError(f"{said}: say where labels are with --label, or repack the data set")
            if number >= MOST_LABELS:
                raise InputError(f"{where}: label {number} is beyond {MOST_LABELS}: repack the data set")
            self._mark(True, where)
            self.classes = max(self.classes, number + 1)

    def _agree(self, kind: str, shape: tuple[int, ...], where: str) -> None:
        self.kind, self.shape = self.kind or kind, self.shape or shape
        if kind != self.kind or (kind == "point" and shape != self.shape):
            raise InputError(f"{where}: {kind} {shape}, others are {self.kind} {self.shape}: {_ALIKE}")
        if kind == "image":  # grey ones are read as colour among others
            sides = shape[1:] if shape[1:] == self.shape[1:] else (0, 0)
            self.shape = (max(shape[0], self.shape[0]), *sides)

    def _mark(self, labelled: bool, where: str) -> None:
        self.labelled = labelled if self.labelled is None else self.labelled
        if self.labelled != labelled:
            what = f"label ({self.label})" if self.label else ".cls"
            raise InputError(f"{where}: {'a' if labelled else 'no'} {what}, unlike others: {_ALIKE}")

    def merge(self, other: "Survey", where: str) -> Iterator[str]:
        """Take account of what another one has seen in a shard; its problems."""
        if not other.kind:
            return
        try:
            self._agree(other.kind, other.shape, where)
            if other.labelled is not None:
                self._mark(other.labelled, where)
            self.classes = max(self.classes, other.classes)
            self.texts |= other.texts
        except InputError as error:
            yield str(error)

    def manifest(
        self, name: str, labels: tuple[str, ...], shards: dict[str, list[Shard]], old: Manifest | None
    ) -> Manifest:
        """The manifest of shards by split. Raises InputError for names of labels that do not fit."""
        if len(set(labels)) < len(labels):
            raise InputError(f"{name}: a label name stands twice: give each label its own")
        if labels and not self.labelled:
            raise InputError(
                f"{name}: {len(labels)} label names, but no sample has a label: leave them out, or --label"
            )
        if labels and len(labels) < self.classes:
            raise InputError(f"{name}: {len(labels)} label names, but labels up to {self.classes - 1}: name them all")
        if labels and (unknown := self.texts - set(labels)):
            raise InputError(f"{name}: label {min(unknown)!r} is none of the {len(labels)} names: name them all")
        if self.label and not self.labelled:
            raise InputError(
                f"{name}: no sample has a label where --label {self.label} says: check it, or leave it out"
            )
        numbers = all(text.isdecimal() and len(text) < 19 for text in self.texts)
        texts = sorted(self.texts, key=lambda text: (int(text) if numbers else 0, text))
        names = labels or tuple(texts) or tuple(str(number) for number in range(self.classes))
        found = {(shard.name, shard.bytes, shard.samples) for split in shards.values() for shard in split}
        splits = old.splits.values() if old else ()
        before = {(shard.name, shard.bytes, shard.samples) for split in splits for shard in split.shards}
        return Manifest.of(
            name,
            self.kind,
            self.shape,
            names,
            shards,
            dealt=bool(old and old.dealt and before == found),  # tars of `naign pack` stay what they are
            label=self.label,
        )


def _form(sample: dict[str, Any], where: str, *, whole: bool) -> tuple[str, tuple[int, ...]]:
    """Kind and shape of a sample, decoded if `whole`."""
    suffix = next((suffix for suffix in SUFFIXES["image"] if suffix in sample), None)
    if suffix is None:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES['image'])}: is this an image data set?")
    try:
        if suffix != "npy":
            return "image", decode_image(sample[suffix]).shape if whole else header_shape(sample[suffix])
        with decoding():
            array = np.load(io.BytesIO(sample[suffix]), allow_pickle=False)
            if not array.size:
                raise InputError(f"no values, its shape is {array.shape}")
            if not np.isfinite(array).all():
                raise InputError("a value is not finite")
    except InputError as error:
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): {_BROKEN}") from None
    kind = next((kind for kind, form in FORMS.items() if form == (str(array.dtype), array.ndim)), None)
    if kind is None:
        found = f"{array.dtype} of {array.shape}"
        raise InputError(f"{where}: the .npy is {found}: images are uint8 (C, H, W), points float32 (D,)")
    return kind, array.shape
