"""Verification of a data set: every sample is read as training reads it."""

from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.format.survey import THREADS, check_problems
from naign.data.order import Piece
from naign.data.reader import Reader
from naign.errors import InputError
from naign.storage.prefetch import in_order


class Report(NamedTuple):
    """The sound data that `verify` read."""

    samples: int
    broken: list[str]  # of them: shard and key of those that index.json records as broken


def verify(path: str, *, index: str = "", progress: bool = True) -> Report:
    """Read every sample of a data set: sizes, hashes, page tables, pixels, shapes, labels. Samples that index.json says
    are broken may be. InputError lists the problems, each with its shard, and its key if it has one.
    """
    config = DataConfig(path=path, index=index)
    manifest = Manifest.load(index or path)
    shards = manifest.shards
    calls = []
    for name, split in manifest.splits.items():
        reader = Reader(config, manifest, name)
        calls += [partial(_find_problems, reader, number) for number in range(len(split.shards))]
    hidden = None if progress else True  # None: where stderr is not a terminal
    found = tqdm(in_order(calls, THREADS), desc=f"verify {path}", total=len(calls), unit="shard", disable=hidden)
    broken = []
    problems = []
    for shard, by_key in zip(shards, found, strict=True):
        for key, problem in by_key.items():
            if key in manifest.broken.get(shard.name, ()):
                broken.append(f"{shard.name} {key}")
            else:
                problems.append(problem)
    check_problems(path, problems)
    return Report(sum(shard.samples for shard in shards), broken)


def _find_problems(reader: Reader, number: int) -> dict[str, str]:
    """The problems of a shard by the key of the sample; that of the shard itself, after which it is not read, by ""."""
    problems = {}
    whole = Piece(epoch=0, shard=number, first=0, last=reader.shards[number].samples)
    try:
        for raw in reader.raw([whole]):
            try:
                reader.row(raw)
            except InputError as error:
                problems[raw.sample["__key__"]] = str(error)
    except InputError as error:
        problems[""] = str(error)
    return problems
