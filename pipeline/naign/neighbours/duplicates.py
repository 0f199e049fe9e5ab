"""Near-duplicates in a data set: pairs of images of any split that are within a distance of each other, also mirrored.

Groups are the connected components of these pairs. A training image is redundant if its group has a test image, or a
training image before it: without the redundant ones each group has one training image at most, and none if it has test
images. Images of other splits than `train` are never redundant.
"""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.scale import scaled
from naign.distributed.ranks import together
from naign.errors import InputError, require
from naign.match.exchange import ranks_of
from naign.neighbours import DuplicatesOptions
from naign.neighbours.images import Images, as_csv, as_json
from naign.neighbours.rows import ImageRows, Space, check_threshold, find_near, firsts
from naign.observe.pictures import png, rows
from naign.storage.store import open_store

TRAIN = "train"
THRESHOLDS = {"pixels": 10.0, "efficientnet-lite0": 0.44, "cifar10-cnn64": 0.14}
"""Default distances by encoder. Of the pairs of CIFAR-10 within them nearly all show the same photograph."""
HEADER: tuple[object, ...] = (
    "group",
    "split",
    "shard",
    "key",
    "distance",
    "redundant",
)
SHOWN = 24  # groups in the picture
WIDEST = 12  # images of each

Group = dict[int, float]
"""Distance of each image of a group to the nearest other one, by number, ascending."""


def duplicates(options: DuplicatesOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Collective: write groups.csv, groups.png and duplicates.json. Returns what duplicates.json holds, on rank 0.

    Each rank reads and searches its part; the files do not depend on the number of ranks. Memory is that of some blocks
    and of all pairs. Raises InputError where there is no data set or encoder.
    """
    ranks = ranks_of(None)
    encoder = options.encoder
    limit = options.threshold
    if limit is None:
        limit = THRESHOLDS.get(encoder)
    with together(accelerator):
        manifest = Manifest.load(options.index or options.data)
        broken = "error"
        if manifest.broken:
            broken = "skip"
        config = DataConfig(path=options.data, index=options.index, broken=broken)
        training_first = sorted(manifest.splits, key=lambda split: split != TRAIN)
        images = Images(config, *training_first)
        if limit is None:
            raise InputError(f"{encoder} has no default threshold: give --threshold, and look at groups")
        check_threshold(limit)
        require((len(images) > 1, f"{options.data} holds one image, which can have no duplicate"))
        space = Space(encoder, images.shape, accelerator.device)
        every = ImageRows("images", len(images), images.read, space, ranks)
    near = find_near(every, every, ranks, accelerator.device, within=limit)
    result = {
        "dataset": manifest.name,
        "images": len(images),
        "encoder": encoder,
        "threshold": limit,
    }
    with together(accelerator):
        if accelerator.is_main_process:
            low = near[:, :2].amin(1)
            high = near[:, :2].amax(1)
            pairs = torch.stack([low, high, near[:, 2]], dim=1)
            pairs = firsts(pairs[low < high], 2)
            write(pairs, result, images, space, options.to)
    return result


def write(
    pairs: Tensor,
    result: dict[str, Any],
    images: Images,
    space: Space,
    to: str,
) -> None:
    """Write the groups of pairs (p, 3): two numbers, and the bits of their squared distance; and add to `result`."""
    numbers = pairs[:, :2].unique()
    places = images.places(numbers.tolist())
    broken = torch.tensor(
        [number for number, place in places.items() if place.broken],
        dtype=torch.int64,
    )
    stood_in = torch.isin(pairs[:, :2], broken).any(1)  # another image was read for one of the two
    pairs = pairs[~stood_in]
    groups = connect(pairs, space.distances(pairs[:, 2]))
    trained = 0
    if TRAIN in images.manifest.splits:
        trained = images.manifest.splits[TRAIN].samples
    redundant = 0
    lines = [HEADER]
    for name, group in enumerate(groups):
        left_out = redundant_in(group, trained)
        redundant += len(left_out)
        for number, distance in group.items():
            place = places[number]
            line = (
                name,
                place.split,
                place.shard,
                place.key,
                distance,
                int(number in left_out),
            )
            lines.append(line)
    first = pairs[:, 0]
    second = pairs[:, 1]
    beside = second[(first < trained) & (second >= trained)].unique()
    result |= {
        "pairs": len(pairs),
        "groups": len(groups),
        "images_in_groups": len(lines) - 1,
        "test_images_near_training": len(beside),
        "redundant": redundant,
    }
    store = open_store(to)
    store.put("groups.csv", as_csv(lines))
    store.delete("groups.png")
    if groups:
        store.put("groups.png", png(draw_groups(groups, images)))
    store.put("duplicates.json", as_json(result))


def connect(pairs: Tensor, distances: Tensor) -> list[Group]:
    """The connected components of pairs (p, 2 or more) int64, those with the nearest pair first."""
    numbers, ends = pairs[:, :2].unique(return_inverse=True)
    nearest = torch.full((len(numbers),), math.inf, dtype=torch.float64)
    nearest.scatter_reduce_(0, ends.T.flatten(), distances.repeat(2), "amin")
    edges = (np.ones(len(ends)), tuple(ends.T.numpy()))
    graph = coo_array(edges, shape=(len(numbers), len(numbers)))
    labels = connected_components(graph, directed=False)[1].tolist()
    groups = dict[int, Group]()
    for label, number, distance in zip(labels, numbers.tolist(), nearest.tolist(), strict=True):
        groups.setdefault(label, {})[number] = distance
    return sorted(groups.values(), key=lambda group: (min(group.values()), min(group)))


def redundant_in(group: Group, trained: int) -> list[int]:
    """The redundant images of a group; training images are those below `trained`."""
    training = [number for number in group if number < trained]
    if len(training) == len(group):
        return training[1:]
    return training


def draw_groups(groups: list[Group], images: Images) -> Image.Image:
    """SHOWN groups, evenly from the one with the nearest pair to that with the most distant: to judge the threshold."""
    lines = []
    places = torch.linspace(0, len(groups) - 1, min(SHOWN, len(groups)))
    for place in places.round().int().tolist():
        group = groups[place]
        numbers = list(group)[:WIDEST]
        members = [images.read(number, number + 1) for number in numbers]
        lines.append((f"{min(group.values()):.3g}", scaled(torch.cat(members))))
    return rows(lines)
