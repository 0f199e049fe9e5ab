"""What an interrupted audit has finished: files in its output folder, named by all that they depend on."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from naign.data.mixing import DataSets
from naign.distributed.ranks import together
from naign.errors import InputError, require
from naign.match.exchange import ranks_of
from naign.model.encoders import Encoder
from naign.neighbours import Options
from naign.storage.store import open_store
from naign.terminal import DELAY

FACTS = "work.json"
PARTS = re.compile(r"work\.json|work-[0-9a-f]{16}-.+\.safetensors")  # all that an audit leaves when it is interrupted
READ = ("split", "size", "fit", "crop", "broken")  # settings of data that change which images are read, or how


class Work:
    """Tensors in files that appear whole, the same for any number of ranks, which may share the folder."""

    def __init__(
        self, to: str, sets: DataSets, encoder: Encoder | None, options: Options, accelerator: Accelerator, **more: str
    ) -> None:
        """Collective. Raises InputError where the folder cannot be written; and where an audit of other data, another
        encoder or with other options was interrupted there, whose files are deleted with `force`.
        """
        self.store, self.ranks, network = open_store(to), ranks_of(None), encoder and encoder.network
        state = network.state_dict() if network else {}
        weights = {name: value.cpu().contiguous().clone() for name, value in state.items()}
        facts = asdict(options) | more | {"to": "", "force": False}
        facts["encoder_weights"] = hashlib.sha256(save(weights)).hexdigest()
        facts["manifests"] = hashlib.sha256(b"".join(manifest.dump() for manifest in sets.manifests)).hexdigest()
        facts["read"] = [getattr(sets.configs[0], name) for name in READ]
        text = json.dumps(facts, indent=1).encode()
        self._prefix = f"work-{hashlib.sha256(text).hexdigest()[:16]}-"
        with together(accelerator):
            if accelerator.is_main_process:
                if self.store.exists(FACTS) and (before := self.store.read(FACTS)) != text:
                    other = f"{self.store.url(FACTS)}: an audit with other data, model or options was interrupted there"
                    stranger = f"{self.store.url(FACTS)} is of no audit: name another folder by --to"
                    remedy = "delete what it left there with --force, or name another folder with --to"
                    require((b'"manifests"' in before, stranger), (options.force, f"{other}: {remedy}"))
                    self.end()
                self.store.put(FACTS, text)

    def has(self, part: str) -> bool:
        return self.store.exists(self._name(part))

    def load(self, part: str) -> Tensor:
        name = self._name(part)
        try:
            return load(self.store.read(name))[""]
        except (SafetensorError, KeyError):
            raise InputError(f"{self.store.url(name)} is damaged: delete it, and run the same command again") from None

    def keep(self, part: str, tensor: Tensor) -> None:
        self.store.put(self._name(part), save({"": tensor.contiguous()}))

    def end(self) -> None:
        """Delete all parts."""
        for name in filter(PARTS.fullmatch, self.store.list()):
            self.store.delete(name)

    def bar(self, what: str, total: int) -> "tqdm[Any]":
        """Progress in blocks, on rank 0."""
        return tqdm(desc=what, total=total, unit="block", delay=DELAY, leave=False, disable=self.ranks.rank > 0 or None)

    def _name(self, part: str) -> str:
        return f"{self._prefix}{part}.safetensors"


def as_csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> bytes:
    """The file of a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue().encode()
