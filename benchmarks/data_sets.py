"""What goes into data.py and comes out: its data sets, on disk and in a bucket, and its tables.

The sets are functions of their numbers, so the same options give the same bytes. Where MNIST or CIFAR-10 are not given,
they are made: scikit-learn's digits of 8x8 pixels enlarged, turned and moved; windows of its two sample photographs,
of any size, place, brightness and colour. Photographs of 256x256 are always such windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from data_job import Job, Record
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from trained import table

from naign.data.format.manifest import INDEX, Manifest
from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.source import Example, Made, Source
from naign.errors import InputError

Name = Literal["grey28", "colour32", "photos256"]
SHARDS = 16


@dataclass(kw_only=True, slots=True, frozen=True)
class Kind:
    """One of the sets."""

    title: str
    shape: tuple[int, int, int]
    encoding: str
    images: int
    round: int
    """Images that ours gives at once."""


SETS: dict[Name, Kind] = {
    "grey28": Kind(title="28x28 grey PNG", shape=(1, 28, 28), encoding="png", images=60_000, round=2_000),
    "colour32": Kind(title="32x32 colour JPEG", shape=(3, 32, 32), encoding="jpg", images=50_000, round=2_000),
    "photos256": Kind(title="256x256 colour JPEG", shape=(3, 256, 256), encoding="jpg", images=6_000, round=500),
}
LARGE = {"64 MB": 330, "1 GB": 5_520}
"""Images of one shard of raw 256x256 pixels, by the size that it has about."""
LARGE_ROUND = 30

Make = Callable[[int], Example]


def prepare(
    name: Name,
    count: int,  # images
    scratch: Path,
    *,
    given: Path | None,  # a packed set to take them from
) -> tuple[Path, str]:
    """The folder of the packed set, made where it is not there yet; and what it is, in words."""
    kind = SETS[name]
    folder = scratch / f"{name}-{count}-{given.resolve().name if given else 'made'}"
    if given:
        found = Manifest.load(str(given))
        samples = found.split("train").samples
        if found.shape != kind.shape or samples < count:
            raise InputError(f"{given}: {samples} images of {found.shape}: {count} of {kind.shape} are needed")
        make, source = _given(given, count), f"the first {count:,} training images of {given.name}"
    elif name == "grey28":
        make, source = digit, "digits of scikit-learn, enlarged"
    else:
        make, source = window(kind.shape[1]), "windows of two photographs of scikit-learn"
    if not (folder / INDEX).exists():
        examples = Made(length=count, make=make)
        packed = Source(name=name, kind="image", shape=kind.shape, labels=(), splits={"train": examples})
        pack(packed, str(folder), shards=SHARDS, encoding=kind.encoding)
    return folder, source


def prepare_large(images: int, scratch: Path) -> Path:
    """One shard of that many images of 256x256 as raw pixels: what it costs to read is not decoding."""
    folder, shape = scratch / f"large-{images}", SETS["photos256"].shape
    if not (folder / INDEX).exists():
        few = [window(shape[1])(index) for index in range(min(images, 64))]

        def make(index: int) -> Example:
            _, pixels, label = few[index % len(few)]
            return f"{index:06d}", pixels ^ np.uint8(index // len(few)), label

        examples = Made(length=images, make=make)
        pack(
            Source(name="large", kind="image", shape=shape, labels=(), splits={"train": examples}),
            str(folder),
            shards=1,
            encoding="npy",
        )
    return folder


def _given(packed: Path, count: int) -> Make:
    """The first training images of a packed set, read when the first of them is asked for."""

    @lru_cache(maxsize=1)
    def read() -> tuple[Tensor, Tensor]:
        return read_split(str(packed), "train", limit=count)

    def make(index: int) -> Example:
        images, labels = read()
        return f"{index:06d}", images[index].numpy(), max(0, int(labels[index]))

    return make


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Any]:
    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target


def digit(index: int) -> Example:
    """A digit of 28x28, about as large as a PNG as MNIST's are."""
    images, labels = _digits()
    draws = np.random.Generator(np.random.Philox(key=0, counter=index)).random(5)
    row = int(draws[0] * len(images))
    glyph = Image.fromarray(images[row]).resize((20, 20), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(30 * draws[1] - 15, Image.Resampling.BILINEAR)
    glyph = glyph.point([int(min(255, max(0, 2.2 * (value - 90)))) for value in range(256)])
    canvas = Image.new("L", (28, 28))
    canvas.paste(glyph, (2 + int(5 * draws[2]), 2 + int(5 * draws[3])))
    return f"{index:06d}", np.asarray(canvas)[None], int(labels[row])


def window(side: int) -> Make:
    """Makes images of so many pixels a side, each a window of a photograph."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]

    def make(index: int) -> Example:
        draws = np.random.Generator(np.random.Philox(key=side, counter=index)).random(7)
        label = int(draws[0] * len(photographs))
        picture = photographs[label]
        least = min(side, 160)
        extent = least * (min(picture.size) / least) ** draws[1]
        left, top = draws[2] * (picture.width - extent), draws[3] * (picture.height - extent)
        box = (left, top, left + extent, top + extent)
        patch = picture.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        for enhance, draw in ((ImageEnhance.Brightness, draws[4]), (ImageEnhance.Color, draws[5])):
            patch = enhance(patch).enhance(0.75 + draw / 2)
        pixels = np.asarray(patch)[:, :: 1 if draws[6] < 0.5 else -1]
        return f"{index:06d}", np.ascontiguousarray(pixels.transpose(2, 0, 1)), label

    return make


def job_of(folder: Path, round: int) -> Job:
    """Reads a packed set in a folder."""
    manifest = Manifest.load(str(folder))
    split = manifest.split("train")
    suffix = "png" if manifest.shape[0] == 1 else "jpg"
    return Job(
        path=str(folder),
        local=str(folder),
        shards=tuple(shard.name for shard in split.shards),
        bytes=sum(shard.bytes for shard in split.shards),
        images=split.samples,
        round=round,
        suffix=suffix,
        grey=manifest.shape[0] == 1,
    )


def check_sums(name: Name, sums: dict[str, int]) -> None:
    """RuntimeError unless all readers saw the same pixels; of JPEG, whose decoders may round otherwise, nearly."""
    seen = [total for total in sums.values() if total]
    off = (max(seen) - min(seen)) / max(seen) if seen else 0.0
    if off > (0.0 if SETS[name].encoding == "png" else 1e-3):
        raise RuntimeError(f"{name}: readers do not give the same pixels: {sums}")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def images_table(sets: dict[str, Record]) -> str:
    """A row a reader, a column a set."""
    titles = ["from", "reader", *(f"{found['title']}, {found['images']:,}" for found in sets.values())]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, found in sets.items():
        for row in found["rows"]:
            reader = f"*{row['title']}*" if row["floor"] else row["title"]
            if "missing" in row:
                text = f"`{row['missing']}`"
            else:
                best, median = (found["images"] / row[key] for key in ("seconds", "median"))
                speed, cpu = row["bytes"] / row["seconds"] / 1e6, 1e6 * row["cpu"] / found["images"]
                text = f"{number(best)}/s ({number(median)}), {number(speed)} MB/s, {number(cpu)} µs"
            cells.setdefault((row["where"], reader), {})[name] = text
    order = sorted(cells, key=lambda key: ("folder", "S3", "memory").index(key[0]))
    return table(titles, [[*key, *(cells[key].get(name, "") for name in sets)] for key in order])


def bytes_table(large: Record) -> str:
    """Each reader of bytes, the one of boto3 that does the same being 1."""
    size, rows = large["read"], []
    for title, row in large["rows"].items():
        base = large["rows"][title.replace("ours", "boto3")]
        best, median = (size / row[key] / 1e6 for key in ("seconds", "median"))
        cpu = f"{1e9 * row['cpu'] / size:.2f} s"
        rows.append([title, f"{number(best)} MB/s ({number(median)})", f"{base['median'] / row['median']:.2f}", cpu])
    return table(["reader", f"{number(size / 1e6)} MB, a shard three times", "times boto3", "CPU time a GB"], rows)


def memory_table(large: Record) -> str:
    sizes = large["bytes"]
    rows = [[title, *(f"{number(peaks[size] / 1e6)} MB" for size in sizes)] for title, peaks in large["memory"].items()]
    return table(["reader", *(f"shard of {number(size / 1e6)} MB" for size in sizes.values())], rows)


def page(results: Record) -> str:
    machine, sets, large = results["machine"], results["sets"], results["large"]
    parts = [
        f"""`python benchmarks/data.py --to benchmarks/results/data` on {machine["processor"]},
{machine["cores"]} cores, Pillow {machine["pillow"]}, WebDataset {machine["webdataset"]}, boto3 {machine["boto3"]}.
The head of the script says what was measured, and how to repeat it."""
    ]
    if sets:
        sources = "; ".join(f"{found['title']}: {found['source']}" for found in sets.values())
        parts.append(
            f"""Images a second, decoded by one process: best run (median), MB/s fetched, CPU time an image.
Floors in italics. {sources}."""
        )
        parts.append(images_table(sets))
    if large:
        parts += ["A large shard from S3, three times, in pieces of 1 MiB: best run (median).", bytes_table(large)]
        parts += ["What a process' resident set grew by at most.", memory_table(large)]
    return "\n\n".join(parts) + "\n"
