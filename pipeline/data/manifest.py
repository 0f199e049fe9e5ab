"""index.json: what a packed data set holds. It is written last, so a data set without it does not exist."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.data.store import open_store
from pipeline.errors import InputError

INDEX = "index.json"
FORMAT = 1


@dataclass(kw_only=True, slots=True, frozen=True)
class Shard:
    """One tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Split:
    """`train` or `test`: its shards in order."""

    samples: int
    shards: tuple[Shard, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class Manifest:
    """A packed data set."""

    name: str
    kind: str
    """`image` or `point`."""
    shape: tuple[int, ...]
    """Of one sample: (C, H, W) of an image, (D,) of a point."""
    dtype: str
    """`uint8` of an image, `float32` of a point."""
    labels: tuple[str, ...]
    """Name of each label; empty where there are none."""
    splits: dict[str, Split]

    @classmethod
    def load(cls, path: str) -> "Manifest":
        """Read it from a local folder or `s3://bucket/prefix`.

        Raises InputError where the folder, or index.json in it, is missing, empty, malformed or of another format.
        """
        store = open_store(path)
        names = store.list()
        if not names:
            raise InputError(
                f"{path}: no data set here, the folder is missing or empty: "
                f"check the path, or make one with `naign pack mnist --to {path}`"
            )
        if INDEX not in names:
            raise InputError(
                f"{path}: no {INDEX} among its {len(names)} files: packing was interrupted, or this is no packed data "
                f"set: run `naign pack` again, or check the path"
            )
        return cls.parse(store.read(INDEX), where=store.url(INDEX))

    @classmethod
    def parse(cls, text: bytes, *, where: str) -> "Manifest":
        """Read it from the bytes of the index.json at `where`. Raises InputError."""
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT:
                raise InputError(
                    f"{where}: format {version!r}, but this program reads format {FORMAT}: "
                    f"pack the data set again, or use the NAIGN that packed it"
                )
            splits = {
                name: Split(samples=int(split["samples"]), shards=tuple(Shard(**shard) for shard in split["shards"]))
                for name, split in fields.pop("splits").items()
            }
            shape, labels = tuple(map(int, fields.pop("shape"))), tuple(map(str, fields.pop("labels")))
            manifest = cls(shape=shape, labels=labels, splits=splits, **fields)
            problem = _problem(manifest)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise InputError(f"{where}: malformed ({problem}): pack the data set again")
        return manifest

    def split(self, name: str) -> Split:
        """The split of that name. Raises InputError, naming those there are, where there is none."""
        if name not in self.splits:
            raise InputError(f"data set {self.name} has no split {name!r}: choose one of {', '.join(self.splits)}")
        return self.splits[name]

    def dump(self) -> bytes:
        """The bytes of its index.json."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode()


def _problem(manifest: Manifest) -> str:
    """What contradicts itself, or ''."""
    form = {"image": (3, "uint8"), "point": (1, "float32")}.get(manifest.kind)
    if form != (len(manifest.shape), manifest.dtype) or min(manifest.shape) < 1:
        return f"kind {manifest.kind}, shape {manifest.shape} and dtype {manifest.dtype} do not go together"
    for name, split in manifest.splits.items():
        if not split.shards or min(shard.samples for shard in split.shards) < 1:
            return f"split {name} has no shards, or an empty one"
        if sum(shard.samples for shard in split.shards) != split.samples:
            return f"the samples of the shards of split {name} do not add up to {split.samples}"
    return "" if manifest.splits else "no splits"
