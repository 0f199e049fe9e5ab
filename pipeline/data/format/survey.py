"""A survey of samples in tars by others: their kind, shape and labels, which no manifest states yet."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.data.decode import decode_array, decode_image, decoding, header_shape, parse_npy
from pipeline.data.format.labels import label_text
from pipeline.data.format.manifest import CHANNELS, FORMS, Manifest
from pipeline.data.format.shards import Shard
from pipeline.data.sample import SUFFIXES
from pipeline.errors import InputError

log = logging.getLogger("naign.data")

MOST_LABELS = 1_000_000  # a larger number in .cls is no label, and more texts are no classes
_BROKEN = "repack the data set, or index it with --keep-broken and train with --data.broken=skip"
_ALIKE = "all samples must be alike; `naign pack folder` makes them so"


@dataclass(kw_only=True)
class Survey:
    """Kind, shape and labels of the samples seen so far; all must be of one kind, and all labelled or none."""

    label: str = ""
    """Where labels are, see labels.label_text."""
    check: int | None = None
    """Samples of each tar to decode; of the others only the header is read. None: all."""
    keep_broken: bool = False
    """Whether samples that cannot be decoded are recorded, not refused."""
    kind: str = ""
    shape: tuple[int, ...] = ()
    """(C, 0, 0) of pictures that differ in size."""
    seen: int = 0
    labelled: bool | None = None
    classes: int = 0
    """One more than the largest number in .cls."""
    texts: set[str] = field(default_factory=set)
    """The labels, where they are not numbers in .cls."""
    broken: list[str] = field(default_factory=list)
    """Keys of samples that cannot be decoded."""

    def anew(self) -> "Survey":
        """A survey with these settings that has seen nothing."""
        return Survey(label=self.label, check=self.check, keep_broken=self.keep_broken)

    def agrees_with(self, settings: "Survey") -> bool:
        """Whether a survey with these settings would have the same results."""
        same = (self.label, self.check) == (settings.label, settings.check)
        return same and (settings.keep_broken or not self.broken)

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> "Survey":
        """The survey with these fields, as JSON has them."""
        return replace(cls(**record), shape=tuple(record["shape"]), texts=set(record["texts"]))

    def see(self, sample: dict[str, Any], where: str) -> None:
        """Add a sample. Raises InputError where it is unlike the others or cannot be decoded."""
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
        if text is not None and self.label:
            self.texts.add(text)
            if len(self.texts) > MOST_LABELS:
                raise InputError(f"{where}: the {MOST_LABELS + 1}th label: --label {self.label} gives no classes")
        elif text is not None:
            self.classes = max(self.classes, _number(text, where) + 1)
        self._mark(text is not None, where)

    def _agree(self, kind: str, shape: tuple[int, ...], where: str) -> None:
        self.kind, self.shape = self.kind or kind, self.shape or shape
        if kind != self.kind or (kind == "point" and shape != self.shape):
            raise InputError(f"{where}: {kind} {shape}, others are {self.kind} {self.shape}: {_ALIKE}")
        if kind == "image":  # grey pictures are read as colour where others have it
            sides = shape[1:] if shape[1:] == self.shape[1:] else (0, 0)
            self.shape = (max(shape[0], self.shape[0]), *sides)

    def _mark(self, labelled: bool, where: str) -> None:
        self.labelled = labelled if self.labelled is None else self.labelled
        if self.labelled != labelled:
            what = f"label ({self.label})" if self.label else ".cls"
            raise InputError(f"{where}: {'a' if labelled else 'no'} {what}, unlike others: {_ALIKE}")

    def merge(self, other: "Survey", where: str) -> Iterator[str]:
        """Merge another shard's survey into this one; yields conflicts."""
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
        """The manifest of shards by split; `old` is the one that it replaces. Raises InputError for unfit `labels`."""
        shapes = {(shard.name, shard.bytes, shard.samples) for split in shards.values() for shard in split}
        splits = old.splits.values() if old else ()
        before = {(shard.name, shard.bytes, shard.samples) for split in splits for shard in split.shards}
        manifest = Manifest.of(name, self.kind, self.shape, self._label_names(name, labels), shards)
        dealt = bool(old and old.dealt and before == shapes)  # tars of `naign pack` stay what they are
        return replace(manifest, dealt=dealt, label=self.label)

    def _label_names(self, name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The given names of labels, or those in the samples, in order. Raises InputError for names that do not fit."""
        problem = ""
        if len(set(labels)) < len(labels):
            problem = "a label name occurs twice: give each label its own"
        elif labels and not self.labelled:
            problem = f"{len(labels)} label names, but no sample has a label: leave them out, or --label"
        elif labels and len(labels) < self.classes:
            problem = f"{len(labels)} label names, but labels up to {self.classes - 1}: name them all"
        elif labels and (unknown := self.texts - set(labels)):
            problem = f"label {min(unknown)!r} is none of the {len(labels)} names: name them all"
        elif self.label and not self.labelled:
            problem = f"no sample has a label where --label {self.label} says: check it, or leave it out"
        if problem:
            raise InputError(f"{name}: {problem}")
        numeric = all(text.isdecimal() and len(text) < 19 for text in self.texts)
        texts = sorted(self.texts, key=lambda text: (int(text) if numeric else 0, text))
        return labels or tuple(texts) or tuple(str(number) for number in range(self.classes))


def _number(text: str, where: str) -> int:
    """The label in a .cls. Raises InputError where it is none."""
    if not text.isdecimal() or len(text) >= 19 or int(text) >= MOST_LABELS:
        what = f"label {text[:20]!r} is none that .cls can hold, a number below {MOST_LABELS}"
        raise InputError(f"{where}: {what}: say where labels are with --label, or repack the data set")
    return int(text)


def _form(sample: dict[str, Any], where: str, *, whole: bool) -> tuple[str, tuple[int, ...]]:
    """Kind and shape of a sample, decoded if `whole`."""
    suffix = next((suffix for suffix in SUFFIXES["image"] if suffix in sample), None)
    if suffix is None:
        raise InputError(f"{where}: no member ends in {' or '.join(SUFFIXES['image'])}: is this an image data set?")
    try:
        if suffix != "npy":
            return "image", decode_image(sample[suffix]).shape if whole else header_shape(sample[suffix])
        with decoding():
            shape, _, dtype, _ = parse_npy(sample[suffix])
        kind = next((kind for kind, form in FORMS.items() if form == (str(dtype), len(shape))), "")
        if kind:
            decode_array(sample[suffix], shape, str(dtype))
    except InputError as error:
        raise InputError(f"{where}: the .{suffix} cannot be decoded ({error}): {_BROKEN}") from None
    if not kind:
        wanted = "images are uint8 (C, H, W), points float32 (D,)"
        raise InputError(f"{where}: the .npy is {dtype} of {shape}: {wanted}")
    if kind == "image" and shape[0] not in CHANNELS:
        raise InputError(f"{where}: the .npy has {shape[0]} channels, not 1 or 3: repack the data set")
    return kind, shape
