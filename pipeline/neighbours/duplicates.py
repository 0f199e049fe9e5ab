"""Near-duplicates in a data set: all pairs of images, of whatever splits, within a distance of each other.

Groups are the connected components of these pairs. An image is redundant if its group has a test image, or an earlier
training image: without the redundant ones no training image is a near-duplicate of a test image, and a group has at
most one training image. Test images are never redundant.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pipeline.data.dataset import DataConfig
from pipeline.data.format.manifest import INDEX, Manifest, Split
from pipeline.data.format.pages import table_name
from pipeline.distributed.ranks import together
from pipeline.errors import require
from pipeline.match import Blocks, search
from pipeline.match.distances import sort_lexically
from pipeline.match.exchange import ranks_of
from pipeline.model.scale import scaled
from pipeline.neighbours.images import Images, Place
from pipeline.neighbours.rows import Rows, compare, open_space
from pipeline.neighbours.work import Work, data_facts, encoder_digest
from pipeline.observe.pictures import png, rows
from pipeline.storage.store import open_store

TRAIN = "train"  # the split whose images may be redundant
PIXEL_THRESHOLD, FEATURE_THRESHOLD = 8.0, 0.3
NEIGHBOURS = 8  # k of the first search; each later one, of queries whose k-th is within the threshold, has 8 times k
MOST = 2**24  # neighbours asked for at once, over all queries of a rank
SHOWN, WIDEST = 24, 12  # groups in the picture, and images of each


class Pairs(NamedTuple):
    """Pairs of images, each once, on rank 0; elsewhere empty."""

    first: Tensor  # (p,) int64
    second: Tensor  # (p,) int64, above `first`
    distances: Tensor  # (p,) float64: the least of the two images' and of either one's mirror image to the other


Group = dict[int, float]
"""Distance to the nearest other image of the group, by number, ascending."""


def duplicates(
    path: str,  # packed or indexed data set
    *,
    accelerator: Accelerator,
    index: str = "",  # where its index.json is, if not beside the shards
    encoder: str = "pixels",  # or the encoder whose features are compared
    threshold: float | None = None,  # greatest distance of near-duplicates; None: the default of pixels or features
    to: str = "duplicates",  # folder or prefix for the results
    drop: str = "",  # folder or prefix for an index without the redundant images
    force: bool = False,  # replace an index in `drop`, give up an interrupted audit of something else in `to`
) -> dict[str, Any]:
    """Collective: write duplicates.json, groups.csv, and of images groups.png; and with `drop` an index. Returns what
    duplicates.json holds.

    Every rank reads and compares its part; the files are the same for every number of ranks. Raises InputError where
    there is no data set or encoder, it has one image, and where an interrupted audit had other data or options.
    """
    ranks, limit = ranks_of(None), threshold
    with together(accelerator):
        require((threshold is None or threshold > 0, f"--threshold is {threshold}: it must be above 0"))
        manifest = Manifest.load(index or path)
        config = DataConfig(path=path, index=index, broken="skip" if manifest.broken else "error")
        images = Images(config, *sorted(manifest.splits, key=lambda split: split != TRAIN))
        require((len(images) > 1, f"{path} holds one image: there is nothing to compare it with"))
        space = open_space(encoder, images.sets.shape, accelerator.device)
        if limit is None:
            limit = FEATURE_THRESHOLD if space.encoder else PIXEL_THRESHOLD
        if drop:
            check_drop(index or path, drop, force=force)
        facts = {"command": "duplicates", "data": data_facts(images.sets), "encoder": encoder_digest(space.encoder)}
        work = Work(open_store(to), ranks, facts | {"threshold": limit})
    with together(accelerator):
        if ranks.rank == 0:
            work.begin(force=force)
    every = Rows("images", len(images), images.read, space, work)
    with together(accelerator):
        every.make()
    pairs = find_pairs(every, limit, work)
    found: dict[str, Any] = {"dataset": manifest.name, "images": len(images), "encoder": encoder, "threshold": limit}
    with together(accelerator):
        if ranks.rank == 0:
            pairs, places = sound(pairs, images)
            groups = connect(pairs, places)
            redundant = [number for each in groups for number in redundant_in(each, places)]
            found |= count(pairs, groups, places) | {"redundant": len(redundant)}
            work.store.put("groups.csv", table(groups, places, set(redundant)))
            if space.views > 1 and groups:
                work.store.put("groups.png", png(draw_groups(groups, images)))
            if drop:
                write_index(images, redundant, index or path, drop)
            work.store.put("duplicates.json", (json.dumps(found, indent=1) + "\n").encode())
    with together(accelerator):
        work.end()
    return found


def find_pairs(every: Rows, threshold: float, work: Work) -> Pairs:
    """Collective: all pairs of images within the threshold. Queries whose k-th neighbour is within it are searched
    again with a larger k.
    """
    ranks, limit = work.ranks, threshold**2 * every.space.scale

    def step(numbers: Tensor, rows: Tensor, blocks: Callable[[], Blocks]) -> Tensor:
        parts, k = [torch.empty(0, 3, dtype=torch.int64)], min(NEIGHBOURS, every.count)
        numbers, queries = numbers.repeat(len(rows)), rows.flatten(0, 1)
        left = torch.arange(len(numbers))
        while most := max(ranks.collect(len(left))):
            again = [left[:0]]
            for start in range(0, most, size := max(1, MOST // k)):
                asked = left[start : start + size]
                answer = search(queries[asked.to(queries.device)], blocks(), every.first, neighbours=k, within=limit)
                squares, ids = answer.distances.cpu(), answer.ids.cpu()
                near = squares <= limit
                row, column = (near & (ids != numbers[asked, None])).nonzero(as_tuple=True)
                mine, others = numbers[asked[row]], ids[row, column]
                ends = torch.minimum(mine, others), torch.maximum(mine, others)
                parts.append(torch.stack([*ends, squares[row, column].view(torch.int64)], dim=1))
                again += [asked[near[:, -1]]] if k < every.count else []
            left, k = torch.cat(again), min(8 * k, every.count)
        return torch.cat(parts)

    first, second, squares = _least(compare(every, every, work, step)).unbind(1)
    return Pairs(first, second, every.space.distance(squares.contiguous().view(torch.float64)))


def _least(pairs: Tensor) -> Tensor:
    """Each pair of (p, 3) once, with its least squared distance, in order; the bits of such numbers sort as they do."""
    order = sort_lexically(*pairs.T)
    pairs = pairs[order]
    again = (pairs[1:, :2] == pairs[:-1, :2]).all(1)
    return torch.cat([pairs[:1], pairs[1:][~again]])


def sound(pairs: Pairs, images: Images) -> tuple[Pairs, dict[int, Place]]:
    """The pairs of images that can be decoded, and where these are."""
    places = images.places(torch.cat([pairs.first, pairs.second]).unique().tolist())
    broken = torch.tensor([number for number, place in places.items() if place.broken], dtype=torch.int64)
    kept = ~(torch.isin(pairs.first, broken) | torch.isin(pairs.second, broken))
    return Pairs(*(part[kept] for part in pairs)), places


def connect(pairs: Pairs, places: dict[int, Place]) -> list[Group]:
    """The connected components of pairs, those with the nearest pair first."""
    members = torch.cat([pairs.first, pairs.second])
    numbers, ends = members.unique(return_inverse=True)
    nearest = torch.full((len(numbers),), math.inf, dtype=torch.float64)
    nearest.scatter_reduce_(0, ends, pairs.distances.repeat(2), "amin")
    first, second = ends.view(2, -1).numpy()
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(numbers), len(numbers)))
    labels = connected_components(graph, directed=False)[1]
    groups = dict[int, Group]()
    for label, number, distance in zip(labels.tolist(), numbers.tolist(), nearest.tolist(), strict=True):
        groups.setdefault(label, {})[number] = distance
    return sorted(groups.values(), key=lambda each: (min(each.values()), min(each)))


def redundant_in(group: Group, places: dict[int, Place]) -> list[int]:
    """The training images of a group that are redundant."""
    trained = [number for number in group if places[number].split == TRAIN]
    return trained if len(trained) < len(group) else trained[1:]


def count(pairs: Pairs, groups: list[Group], places: dict[int, Place]) -> dict[str, Any]:
    """Numbers for duplicates.json."""
    trained = {number for number, place in places.items() if place.split == TRAIN}
    mixed = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    beside = {second for first, second in mixed if first in trained and second not in trained}
    grouped = [distance for group in groups for distance in group.values()]
    return {
        "pairs": len(pairs.first),
        "groups": len(groups),
        "images_in_groups": len(grouped),
        "largest_group": max(map(len, groups), default=0),
        "exact_copies": sum(distance == 0 for distance in grouped),
        "test_images_near_training": len(beside),
    }


def table(groups: list[Group], places: dict[int, Place], redundant: set[int]) -> bytes:
    """groups.csv: a line for each image of each group, with the distance to the nearest other one."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("group", "split", "shard", "key", "distance", "redundant"))
    for name, group in enumerate(groups):
        for number, distance in group.items():
            lines.writerow((name, *places[number][:3], distance, int(number in redundant)))
    return text.getvalue().encode()


def draw_groups(groups: list[Group], images: Images) -> Image.Image:
    """SHOWN groups, from the nearest pair evenly to the most distant one, to judge a threshold."""
    chosen = groups if len(groups) <= SHOWN else [groups[at * (len(groups) - 1) // (SHOWN - 1)] for at in range(SHOWN)]
    shown = [(f"{min(group.values()):.3g}", list(group)[:WIDEST]) for group in chosen]
    return rows([(text, scaled(torch.cat([images.read(at, at + 1) for at in some]))) for text, some in shown])


def check_drop(source: str, drop: str, *, force: bool) -> None:
    """InputError where `drop` holds the index of `source`, or another one and no `force`."""
    target = open_store(drop)
    if target.exists(INDEX):
        same = target.read(INDEX) == open_store(source).read(INDEX)
        require(
            (not same, f"--drop {drop} holds the index of the data set itself: give another folder"),
            (force, f"{target.url(INDEX)} is there already: give another folder with --drop, or replace it by --force"),
        )


def write_index(images: Images, redundant: list[int], source: str, drop: str) -> None:
    """Write index.json and page tables without the redundant images, for data.index. The tables are those of `source`:
    which places of a tar are left out stands in index.json.
    """
    manifest = images.sets.manifests[0]
    without = {name: list(places) for name, places in manifest.without.items()}
    for number in redundant:
        (_, _, _, shard), at = images.locate(number)
        without.setdefault(shard.name, []).append(manifest.place(shard.name, at))
    more = Counter({name: len(places) - len(manifest.without.get(name, ())) for name, places in without.items()})
    splits = dict[str, Split]()
    for name, split in manifest.splits.items():
        shards = tuple(replace(s, samples=s.samples - more[s.name]) for s in split.shards if s.samples > more[s.name])
        require((shards, f"no image of the split {name} is left: all are near-duplicates of others, lower --threshold"))
        splits[name] = Split(samples=sum(shard.samples for shard in shards), shards=shards)
    kept = {shard.name for split in splits.values() for shard in split.shards}
    without = {name: sorted(places) for name, places in without.items() if name in kept}
    thinned = replace(manifest, splits=splits, without=without)
    tables, target = open_store(source), open_store(drop)
    target.delete(INDEX)
    for name in sorted(map(table_name, kept)):
        target.put(name, tables.read(name))
    target.put(INDEX, thinned.dump())
