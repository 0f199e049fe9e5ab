"""What indexing learns of tars by others, of one and of all: shards, page tables, kind, shape and labels."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from naign.data.decode import decode_array, decode_image, decoding, header_shape, parse_npy
from naign.data.format import IndexOptions
from naign.data.format.labels import label_text, parse_number
from naign.data.format.manifest import CHANNELS, FORMS, Manifest, Shard
from naign.data.format.samples import examine
from naign.data.sample import SUFFIXES
from naign.errors import InputError, require
from naign.storage.base import Store

log = logging.getLogger("naign.data")

KEPT = ".indexing.json"  # ends the names of summaries' files, which exist until index.json does

MOST_LABELS = 1_000_000  # a larger number in .cls is no label, and more texts are no classes
_BROKEN = "repack the data set, or index it with --keep-broken and train with --data.broken=skip"
_ALIKE = "all samples must be alike; `naign pack folder` makes them so"


@dataclass(kw_only=True)
class Survey:
    """Kind, shape and labels of the samples seen so far; all must be of one kind, and all labelled or none."""

    label: str
    kind: str = ""
    shape: tuple[int, ...] = ()  # (C, 0, 0) of pictures that differ in size
    labels: set[str] = field(default_factory=set)  # as they are written; empty where no sample has one

    def add(self, kind: str, shape: tuple[int, ...], labels: set[str], where: str) -> None:
        """Add a sample and its label, or samples that are alike. Raises InputError where they are unlike the others."""
        if not self.kind:
            self.kind, self.shape, self.labels = kind, shape, set(labels)
        if kind != self.kind or (kind == "point" and shape != self.shape):
            raise InputError(f"{where}: {kind} {shape}, others are {self.kind} {self.shape}: {_ALIKE}")
        if kind == "image":  # grey pictures are read as colour where others have it
            sides = shape[1:] if shape[1:] == self.shape[1:] else (0, 0)
            self.shape = (max(shape[0], self.shape[0]), *sides)
        if bool(labels) != bool(self.labels):
            what = f"label ({self.label})" if self.label else ".cls"
            raise InputError(f"{where}: {'a' if labels else 'no'} {what}, unlike others: {_ALIKE}")
        self.labels |= labels

    def manifest(
        self, name: str, labels: tuple[str, ...], shards: dict[str, list[Shard]], old: Manifest | None
    ) -> Manifest:
        """The manifest of shards by split; `old` is the one that it replaces. Raises InputError for unfit `labels`."""
        manifest = Manifest.of(name, self.kind, self.shape, self._label_names(name, labels), shards)
        shapes = {(shard.name, shard.bytes, shard.samples) for shard in manifest.shards}
        before = {(shard.name, shard.bytes, shard.samples) for shard in (old.shards if old else ())}
        dealt = bool(old and old.dealt and before == shapes)  # tars of `naign pack` stay what they are
        return replace(manifest, dealt=dealt, label=self.label)

    def _label_names(self, name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The given names of labels, or those in the samples, in order. Raises InputError for names that do not fit."""
        numbers = {text: parse_number(text) for text in self.labels}
        classes = range(0 if self.label else max(numbers.values(), default=-1) + 1)
        unknown = sorted(self.labels - set(labels)) if self.label and labels else []
        but = f"{name}: {len(labels)} label names, but"
        require(
            (self.labels or not labels, f"{but} no sample has a label: leave them out, or --label"),
            (len(labels) >= len(classes) or not labels, f"{but} labels up to {len(classes) - 1}: name them all"),
            (not unknown, f"{but} none of the labels {unknown[:3]}: name them all"),
            (self.labels or not self.label, f"{name}: no sample has a label where --label says: {self.label}"),
        )
        numeric = min(numbers.values(), default=0) >= 0
        texts = sorted(self.labels, key=lambda text: (numbers[text] if numeric else 0, text))
        return labels or tuple(map(str, classes or texts))


@dataclass(kw_only=True)
class Summary:
    """What was read of one tar; also written to a file, so that an interrupted call can continue."""

    shard: Shard
    table: bytes  # the file of its page table
    survey: Survey
    keys: npt.NDArray[np.uint64] = field(repr=False)  # hashes of its samples' keys, sorted
    broken: list[str]  # keys of samples that cannot be decoded
    problems: list[str]

    def dump(self, version: str) -> bytes:
        """The bytes of its file; `version` says what was read, and how."""
        facts = {"shard": asdict(self.shard), "survey": asdict(self.survey), "broken": self.broken}
        packed = {"table": self.table.hex(), "keys": self.keys.astype("<u8").tobytes().hex()}
        body = json.dumps({"version": version, **facts, **packed}, default=sorted)  # sets, as lists
        return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "record": body}).encode()

    @classmethod
    def parse(cls, data: bytes, version: str) -> "Summary | None":
        """The summary in a file, None unless it is whole and of that version."""
        try:
            kept = json.loads(data)
            record = json.loads(kept["record"])
            if kept["sha256"] != hashlib.sha256(kept["record"].encode()).hexdigest() or record["version"] != version:
                return None
            shard, facts = Shard(**record["shard"]), record["survey"]
            survey = Survey(**{**facts, "shape": tuple(facts["shape"]), "labels": set(facts["labels"])})
            table, keys = bytes.fromhex(record["table"]), np.frombuffer(bytes.fromhex(record["keys"]), "<u8")
            return cls(shard=shard, table=table, survey=survey, keys=keys, broken=record["broken"], problems=[])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # cut, or of another version of naign
            return None


def summarize(store: Store, name: str, settings: IndexOptions, *, whole: bool = False) -> Summary:
    """Read every byte of a tar; with `whole` it is also hashed as a whole."""
    survey, broken, seen = Survey(label=settings.label), list[str](), dict[str, str]()

    def see(sample: dict[str, Any]) -> None:
        place = f"{store.url(name)}, key {sample['__key__']}"
        try:
            check = settings.sample_check
            kind, shape = _form(sample, place, whole=check is None or len(seen) <= check)
        except InputError as error:
            if not settings.keep_broken:
                raise
            log.warning("kept: %s", error)
            broken.append(sample["__key__"])
            return
        text = label_text(sample, settings.label, place)
        if text is not None and not settings.label and not 0 <= parse_number(text) < MOST_LABELS:
            what = f"label {text[:20]!r} is none that .cls can hold, a number below {MOST_LABELS}"
            raise InputError(f"{place}: {what}: say where labels are with --label, or repack the data set")
        survey.add(kind, shape, set() if text is None else {text}, place)
        if len(survey.labels) > MOST_LABELS:
            raise InputError(f"{place}: the {MOST_LABELS + 1}th label: --label {settings.label} gives no classes")

    problems, shard, table = examine(store, name, see, seen, whole=whole)
    keys = np.array(sorted(map(key_hash, seen)) if shard else (), np.uint64)
    shard = shard or Shard(name=name, samples=0, bytes=0, pages="")
    return Summary(shard=shard, table=table, survey=survey, keys=keys, broken=broken, problems=problems)


def key_hash(key: str) -> int:
    """64 bits of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


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
        raise InputError(f"{where}: the .npy is {dtype} of {shape}: images are uint8 (C, H, W), points float32 (D,)")
    if kind == "image" and shape[0] not in CHANNELS:
        raise InputError(f"{where}: the .npy has {shape[0]} channels, not 1 or 3: repack the data set")
    return kind, shape
