"""What an interrupted audit has computed: files in its output folder, named by all that their content depends on."""

import hashlib
import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from pipeline.data.mixing import DataSets
from pipeline.errors import InputError
from pipeline.match.exchange import Ranks
from pipeline.model.encoders import Encoder
from pipeline.storage.base import Store
from pipeline.terminal import DELAY

FORMAT = 1  # of the files: raised whenever what is in them changes
FACTS = "work.json"
READ = ("split", "size", "fit", "crop", "broken")  # settings of data that change which images are read, or how


class Work:
    """Parts of an audit, each a few tensors in a file that appears whole or not at all. Parts are the same for every
    number of ranks. `begin` comes first, `end` last.
    """

    def __init__(self, store: Store, ranks: Ranks, facts: dict[str, Any]) -> None:
        """`facts` are the data, model and options that the parts depend on."""
        self.store, self.ranks = store, ranks
        self._facts = json.dumps({"format": FORMAT, **facts}, indent=1).encode()
        self._digest = hashlib.sha256(self._facts).hexdigest()[:16]

    def begin(self, *, force: bool) -> None:
        """On rank 0, before any part is written. InputError where an audit of something else was interrupted, unless
        `force`, which deletes its parts; and where the folder cannot be written.
        """
        if self.store.exists(FACTS) and self.store.read(FACTS) != self._facts:
            other = f"{self.store.url(FACTS)}: an audit with other data, another model or other options stopped here"
            if not force:
                raise InputError(f"{other}: delete the folder {self.store.path}, or start anew with --force")
            self.end()
        self.store.put(FACTS, self._facts)

    def has(self, part: str) -> bool:
        """Whether this rank's folder has the part."""
        return self.store.exists(self._name(part))

    def load(self, part: str) -> dict[str, Tensor]:
        return load(self.store.read(self._name(part)))

    def keep(self, part: str, **tensors: Tensor) -> None:
        self.store.put(self._name(part), save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def bar(self, what: str, total: int) -> "tqdm[Any]":
        """Progress in blocks, on rank 0."""
        return tqdm(desc=what, total=total, unit="block", delay=DELAY, leave=False, disable=self.ranks.rank > 0 or None)

    def end(self) -> None:
        """Delete all parts, and last what they are parts of."""
        for name in [name for name in self.store.list() if name.startswith("work-")]:
            self.store.delete(name)
        self.store.delete(FACTS)

    def _name(self, part: str) -> str:
        return f"work-{self._digest}-{part}.safetensors"


def data_facts(sets: DataSets) -> dict[str, Any]:
    """What the images depend on: all index.json, which hold the hashes of what is read, and how they are resized."""
    first = sets.configs[0]
    digest = hashlib.sha256(b"".join(manifest.dump() for manifest in sets.manifests)).hexdigest()
    return {"index": digest, **{name: getattr(first, name) for name in READ}}


def encoder_digest(encoder: Encoder | None) -> str:
    """SHA-256 of an encoder's name and weights; '' without one."""
    if encoder is None or encoder.network is None:
        return ""
    digest = hashlib.sha256(encoder.name.encode())
    for name, value in sorted(encoder.network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
