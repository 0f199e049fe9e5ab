"""Near-duplicates in a data set: pairs of images of any split that are within a distance of each other, also mirrored.

Groups are the connected components of these pairs. A training image is redundant if its group has a test image, or a
training image before it: without the redundant ones each group has one training image at most, and none if it has test
images. Images of other splits than `train` are never redundant.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from naign.data.dataset import DataConfig
from naign.data.format.manifest import INDEX, Manifest, Split
from naign.data.format.pages import table_name
from naign.distributed.ranks import together
from naign.errors import InputError, require
from naign.model.scale import scaled
from naign.neighbours import DuplicatesOptions
from naign.neighbours.images import Images, Place
from naign.neighbours.rows import Rows, Space, compare, firsts
from naign.neighbours.work import Work, as_csv
from naign.observe.pictures import png, rows
from naign.storage.store import open_store

TRAIN = "train"
THRESHOLDS = {"pixels": 10.0, "efficientnet-lite0": 0.44, "cifar10-cnn64": 0.14}
"""Default distances by encoder. Of the pairs of CIFAR-10 within them nearly all show the same photograph."""
SHOWN, WIDEST = 24, 12  # groups in the picture, and images of each

Group = dict[int, float]
"""Distance of each image of a group to the nearest other one, by number, ascending."""


def duplicates(options: DuplicatesOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Collective: write groups.csv, of images groups.png, duplicates.json, and with `drop` an index for data.index.
    Returns what duplicates.json holds, on rank 0.

    Each rank reads and searches its part; the files do not depend on the number of ranks. Memory is that of some blocks
    and of all pairs. Raises InputError where there is no data set or encoder, and as `Work`.
    """
    path, source, encoder = options.data, options.index or options.data, options.encoder
    with together(accelerator):
        limit = THRESHOLDS.get(encoder, 1.0) if options.threshold is None else options.threshold
        manifest = Manifest.load(source)
        known = options.threshold is not None or (encoder in THRESHOLDS and manifest.kind == "image")
        config = DataConfig(path=path, index=options.index, broken="skip" if manifest.broken else "error")
        images = Images(config, *sorted(manifest.splits, key=lambda split: split != TRAIN))
        space = Space(encoder, images.sets.shape, accelerator.device)
        require(
            (known, f"{manifest.kind}s by {encoder} have no default threshold: give --threshold, and look at groups"),
            (0 <= limit < 1e6, f"--threshold is {limit}: it must be 0 or more, below 1e6"),
            (len(images) > 1, f"{path} holds one image, which can have no duplicate"),
        )
        if options.drop and (target := open_store(options.drop)).exists(INDEX):
            read = [Path(open_store(place).url(INDEX)).resolve() for place in (path, source)]
            itself = Path(target.url(INDEX)).resolve() in read
            there = f"--drop {options.drop} holds {'this' if itself else 'an'} index already: give another folder"
            require((options.force and not itself, there if itself else f"{there}, or replace it by --force"))
    work = Work(options.to, images.sets, space.encoder, options, accelerator)
    with together(accelerator):
        every = Rows("images", len(images), images.read, space, work)
    near = compare(every, every, work, accelerator.device, within=limit)
    counts: dict[str, Any] = {"dataset": manifest.name, "images": len(images), "encoder": encoder, "threshold": limit}
    with together(accelerator):
        if accelerator.is_main_process:
            low, high = near[:, :2].amin(1), near[:, :2].amax(1)
            pairs = firsts(torch.stack([low, high, near[:, 2]], dim=1)[low < high], 2)
            try:
                thinned = write(pairs, counts, images, space, work, manifest if options.drop else None)
            except InputError:
                work.end()  # so that another threshold may be tried
                raise
            if thinned:
                write_index(thinned, source, options.drop)
            work.store.put("duplicates.json", (json.dumps(counts, indent=1) + "\n").encode())
    with together(accelerator):
        work.end()
    return counts


def write(
    pairs: Tensor, counts: dict[str, Any], images: Images, space: Space, work: Work, manifest: Manifest | None
) -> Manifest | None:
    """Write the groups of pairs (p, 3), count in `counts`, and return `manifest` without the redundant images."""
    places, training = images.places(pairs[:, :2].unique().tolist()), images.sets.manifest.splits.get(TRAIN)
    broken = torch.tensor([number for number, place in places.items() if place.broken], dtype=torch.int64)
    pairs = pairs[~torch.isin(pairs[:, :2], broken).any(1)]  # in whose place another image was read
    groups, trained = connect(pairs, space.distances(pairs[:, 2])), training.samples if training else 0
    redundant = {number for group in groups for number in redundant_in(group, trained)}
    beside = pairs[(pairs[:, 0] < trained) & (pairs[:, 1] >= trained), 1].unique()
    counts |= {"pairs": len(pairs), "groups": len(groups), "images_in_groups": sum(map(len, groups))}
    counts |= {"test_images_near_training": len(beside), "redundant": len(redundant)}
    thinned = thin(manifest, [places[number] for number in sorted(redundant)]) if manifest else None
    lines = [
        (name, *places[number][:3], distance, int(number in redundant))
        for name, group in enumerate(groups)
        for number, distance in group.items()
    ]
    work.store.put("groups.csv", as_csv(("group", "split", "shard", "key", "distance", "redundant"), lines))
    work.store.delete("groups.png")
    if groups and space.views > 1:
        work.store.put("groups.png", png(draw_groups(groups, images)))
    return thinned


def connect(pairs: Tensor, distances: Tensor) -> list[Group]:
    """The connected components of pairs (p, 2 or more) int64, those with the nearest pair first."""
    numbers, ends = pairs[:, :2].unique(return_inverse=True)
    nearest = torch.full((len(numbers),), math.inf, dtype=torch.float64)
    nearest.scatter_reduce_(0, ends.T.flatten(), distances.repeat(2), "amin")
    graph = coo_array((np.ones(len(ends)), tuple(ends.T.numpy())), shape=(len(numbers), len(numbers)))
    groups = dict[int, Group]()
    labels = connected_components(graph, directed=False)[1].tolist()
    for label, number, distance in zip(labels, numbers.tolist(), nearest.tolist(), strict=True):
        groups.setdefault(label, {})[number] = distance
    return sorted(groups.values(), key=lambda group: (min(group.values()), min(group)))


def redundant_in(group: Group, trained: int) -> list[int]:
    """The redundant images of a group; training images are those below `trained`."""
    training = [number for number in group if number < trained]
    return training[1:] if len(training) == len(group) else training


def draw_groups(groups: list[Group], images: Images) -> Image.Image:
    """SHOWN groups, evenly from the one with the nearest pair to that with the most distant: to judge the threshold."""
    lines = list[tuple[str, Tensor]]()
    for place in torch.linspace(0, len(groups) - 1, min(SHOWN, len(groups))).round().int().tolist():
        members = [images.read(number, number + 1) for number in list(groups[place])[:WIDEST]]
        lines.append((f"{min(groups[place].values()):.3g}", scaled(torch.cat(members))))
    return rows(lines)


def thin(manifest: Manifest, redundant: list[Place]) -> Manifest:
    """The manifest without the redundant images; InputError where none of a split would be left."""
    more = dict[str, list[int]]()
    for place in redundant:
        more.setdefault(place.shard, []).append(manifest.place(place.shard, place.number))
    splits = dict[str, Split]()
    for name, split in manifest.splits.items():
        counts = [shard.samples - len(more.get(shard.name, ())) for shard in split.shards]
        shards = tuple(replace(s, samples=left) for s, left in zip(split.shards, counts, strict=True) if left)
        require((shards, f"no image of the split {name} would be left: lower --threshold"))
        splits[name] = Split(samples=sum(counts), shards=shards)
    names = [shard.name for split in splits.values() for shard in split.shards]
    without = {name: sorted([*manifest.without.get(name, ()), *more.get(name, ())]) for name in names}
    return replace(manifest, splits=splits, without={name: some for name, some in without.items() if some})


def write_index(manifest: Manifest, source: str, drop: str) -> None:
    """Write index.json, and the page tables of `source`, which stay as they are."""
    tables, target = open_store(source), open_store(drop)
    target.delete(INDEX)
    for name in (table_name(shard.name) for shard in manifest.shards):
        target.put(name, tables.read(name))
    target.put(INDEX, manifest.dump())
