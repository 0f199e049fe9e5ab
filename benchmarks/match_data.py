"""What goes into match.py and comes out: its search problems, their right answers, photographs to pack, its tables.

    mkdir photos && cd photos && apt-get download budgie-backgrounds mate-backgrounds lomiri-wallpapers-16.04
    for package in *.deb; do dpkg-deb -x "$package" .; done; cd ..
    python benchmarks/match_data.py photos --to data/photos64

packs patches of 64x64 in colour. Debian's packages hold some forty photographs: budgie-backgrounds CC0,
lomiri-wallpapers-16.04 CC-BY, CC-BY-SA and CC0, mate-backgrounds GPL-2+. Every fifth photograph gives the test split,
so no test patch overlaps a training patch. A patch is a square of any size and place of its photograph, mirrored or
not, resized to 64x64; which one is a function of its number, so the same photographs give the same bytes.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, get_args

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from trained import table
from tyro.conf import Positional

from naign.data.format.writer import pack
from naign.data.loader import read_split
from naign.data.sources.source import Example, Made, Source
from naign.errors import InputError, exit_on_input_error
from naign.model.naign import NAIGN
from naign.model.networks import build_network, recorded_network
from naign.model.scale import scaled

Kind = Literal["natural", "trained", "untrained"]
"""Test images among training images; training images among samples f(z) of a run, or of its network before training."""

Method = Literal["sgemm", "faiss.knn", "IndexFlatL2", "cdist", "HNSW", "flat", "projected", "rounded", "auto"]
BASE = "faiss.knn"
"""What the others' seconds are compared with."""

WORLDS = (8, 64, 1024)
"""Of the table of more ranks than were measured."""

Record = dict[str, Any]

SETS = {64: "digits", 784: "mnist", 3072: "cifar10", 12288: "photos64"}
"""Name of the data set, and of the run trained on it, by the values of an image."""

SIDE = 64
SHORTER = 1024
"""Pixels to which a photograph's shorter side is reduced first: patches are of 64 to 1,024 of them."""

DRAWN = ("abstract", "desktop", "ocean-waves", "valley-midnight", "waves-midnight", "analogpattern", "umang")
"""Folders and beginnings of names in those packages that are no photographs."""

_BATCH = 512
_CHUNK = 4096


@dataclass(kw_only=True, slots=True, frozen=True)
class Case:
    """A search problem. Both files are .npy, (rows, dims) float32, so that a rank can read its rows alone."""

    kind: Kind
    dims: int
    queries: Path
    candidates: Path
    source: str
    """What the candidates are, in words."""


def prepare(
    kind: Kind,
    dims: int,  # of SETS
    queries: int,  # at most
    candidates: int,  # at most, of real images
    data: Path,  # folder of packed data sets
    runs: Path,  # folder of runs
    scratch: Path,  # what is made is kept here
) -> Case:
    """The case's files, made where they are not there yet. Raises InputError where the data or the run is missing."""
    name = SETS[dims]
    split = "test" if kind == "natural" else "train"
    asked = _images(data / name, split, queries, dims, scratch)
    if kind == "natural":
        pool = _images(data / name, "train", candidates, dims, scratch)
        return Case(kind=kind, dims=dims, queries=asked, candidates=pool, source=f"training images of {name}")
    model = NAIGN.from_pretrained(runs / name)
    seen = int(model.metadata.get("images_seen", 0)) if kind == "trained" else 0
    if kind == "untrained":
        torch.manual_seed(0)
        fresh = build_network(recorded_network(model.metadata["model"]), model.shape)
        model = NAIGN(fresh, model.metadata, model.prior.state_dict())
    pool = scratch / f"{name}-{kind}-{seen}-{candidates}.npy"
    if not pool.exists():
        parts = (model.project(model.latent(ids)) for ids in torch.arange(candidates).split(_BATCH))
        write_rows(pool, parts, candidates, dims)
    source = f"samples of runs/{name} after {seen:,} images, latents {model.metadata['prior']['name']}"
    return Case(kind=kind, dims=dims, queries=asked, candidates=pool, source=source)


def write_rows(path: Path, parts: Iterable[Tensor], rows: int, dims: int) -> None:
    """Write the parts, one after the other, as one .npy (rows, dims) float32; there is no file until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (rows, dims)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            part.reshape(len(part), dims).float().contiguous().numpy().tofile(file)
    os.replace(partial, path)


def read_rows(path: Path, low: int, high: int) -> Tensor:
    """Rows [low, high) of what `write_rows` wrote, (high - low, dims) float32; nothing else is in memory."""
    with path.open("rb") as file:
        dims = _shape(file)[1]
        file.seek(4 * dims * low, os.SEEK_CUR)
        return torch.from_numpy(np.fromfile(file, np.float32, (high - low) * dims).reshape(-1, dims))


def rows_of(path: Path) -> int:
    """How many rows `write_rows` wrote."""
    with path.open("rb") as file:
        return _shape(file)[0]


def right_answers(queries: Tensor, candidates: Tensor) -> Tensor:
    """The id (q,) int64 of each query's nearest candidate by (float64 sum of squared differences, id).

    A float64 matrix product, with a bound of its error, leaves a few candidates; their differences decide.
    """
    centre = candidates.mean(0, dtype=torch.float64)
    near = queries.double() - centre
    least = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    best = torch.zeros(len(queries), dtype=torch.int64)
    for first in range(0, len(candidates), _CHUNK):
        part = candidates[first : first + _CHUNK]
        far = part.double() - centre
        squares = near.square().sum(1)[:, None], far.square().sum(1)
        error = 8 * (near.shape[1] + 8) * 2.0**-53 * (squares[0] + squares[1])
        distances = squares[0] + squares[1] - 2 * near @ far.T
        limit = torch.minimum((distances + error).min(1).values, least)
        left = (distances - error <= limit[:, None]).nonzero()
        for row, column in left.tolist():  # ascending ids: of equals the first is kept
            exact = (queries[row].double() - part[column].double()).square().sum()
            if exact < least[row]:
                least[row], best[row] = exact, first + column
    return best


def photographs(root: Path) -> tuple[list[Path], list[Path]]:
    """The photographs under `root` by split: training, test."""
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    files = [path for path in files if not path.name.startswith(DRAWN) and path.parent.name not in DRAWN]
    if len(files) < 5:
        raise InputError(f"{root}: {len(files)} photographs found, at least 5 are needed: see the head of this script")
    return [path for number, path in enumerate(files) if number % 5], files[::5]


@lru_cache(maxsize=64)
def reduced(path: Path) -> Image.Image:
    """The photograph upright, in colour, its shorter side SHORTER pixels or fewer."""
    with Image.open(path) as opened:
        opened.draft("RGB", (SHORTER, SHORTER))
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    scale = min(1.0, SHORTER / min(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def patches(files: list[Path], count: int, key: int) -> Made:
    """`count` patches, dealt evenly to the photographs; `key` keeps the splits' draws apart."""

    def make(index: int) -> Example:
        picture = reduced(files[index % len(files)])
        draws = np.random.Generator(np.random.Philox(key=key, counter=index)).random(4)
        side = SIDE * (min(picture.size) / SIDE) ** draws[0]
        left, top = draws[1] * (picture.width - side), draws[2] * (picture.height - side)
        box = (left, top, left + side, top + side)
        patch = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        pixels = np.asarray(ImageOps.mirror(patch) if draws[3] < 0.5 else patch)
        return f"patch-{index:06d}", np.ascontiguousarray(pixels.transpose(2, 0, 1)), -1

    return Made(length=count, make=make)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float) -> str:
    return f"{number(value / 1e9)} GB" if value >= 1e9 else f"{number(value / 1e6)} MB"


def wrong(record: Record) -> str:
    return f", {number(100 * record['wrong'])} % wrong" if record["wrong"] else ""


def title(problem: Record) -> str:
    return f"{problem['kind']}, {problem['dims']:,}: {problem['queries']:,} x {problem['candidates']:,}"


def one_process(problems: list[Record]) -> str:
    methods = [name for name in get_args(Method) if any(name in problem["methods"] for problem in problems)]
    rows = []
    for problem in problems:
        cells = [title(problem)]
        for method in methods:
            record = problem["methods"].get(method)
            base = problem["methods"].get(BASE, {}).get("seconds")
            faster = f" ({number(base / record['seconds'])}x)" if record and base else ""
            cells.append(f"{number(record['seconds'])} s{faster}{wrong(record)}" if record else "")
        rows.append(cells)
    return table(["data, values: queries x candidates", *methods], rows)


def several_ranks(problems: list[Record]) -> str:
    columns = ["seconds", "exchange", "memory", "received"]
    rows = []
    for problem in problems:
        alone = problem["ranks"].get("1", {}).get("auto", {}).get("seconds")
        for world, record in problem["ranks"].items():
            ours, peers = (
                [f"{number(one['seconds'])} s{wrong(one)}", f"{number(one['exchange'])} s"]
                + [size(one[column]) for column in columns[2:]]
                for one in (record["auto"], record["peers"])
            )
            faster = f"{alone / record['auto']['seconds']:.2f}x" if alone else ""
            rows.append([title(problem), world, *ours, faster, *peers])
    titles = [*columns, "speed-up", *(f"peers: {column}" for column in columns)]
    return table(["data, values: queries x candidates", "ranks", *titles], rows)


def more_ranks(problems: list[Record]) -> str:
    rows = []
    for problem in problems:
        model = problem["model"]
        most = {name: max(errors, key=abs) for name, errors in model.get("errors", {}).items() if errors}
        checked = ", ".join(f"{name} {100 * error:+.0f} %" for name, error in most.items())
        for world in WORLDS if model else ():
            cells = [title(problem), f"{world:,}"]
            for name in ("strong", "weak"):
                record = model[f"{name} {world}"]
                cells.append("" if record["seconds"] is None else f"{number(record['seconds'])} s")
                cells += ["" if record[key] is None else size(record[key]) for key in ("memory", "received")]
            rows.append([*cells, checked])
    columns = [f"{name}: {column}" for name in ("strong", "weak") for column in ("seconds", "memory", "received")]
    return table(["data, values: queries x candidates", "ranks", *columns, "largest error where checked"], rows)


def page(results: Record) -> str:
    machine, problems = results["machine"], list(results["problems"].values())
    problems.sort(key=lambda problem: (get_args(Kind).index(problem["kind"]), problem["dims"], problem["candidates"]))
    ranked = [problem for problem in problems if problem["ranks"]]
    looked = min((problem["checked"] for problem in problems), default=0)
    text = f"""\
`python benchmarks/match.py --to benchmarks/results/match` on {machine["processor"]},
{machine["cores"]} cores, torch {machine["torch"]}, faiss {machine["faiss"]}.
The head of the script says what was measured, and how to repeat it.

Seconds on {machine["threads"]} threads, and how many times faster than `{BASE}`. The answers to at least {looked:,}
random queries of each problem were compared with float64 differences; none was wrong where the table does not say so.

{one_process(problems)}
"""
    if not ranked:
        return text
    return f"""{text}
Ranks of one thread each, on {machine["cores"]} cores: more ranks than that share them, so their seconds say nothing of
scaling. Ours is `auto`; speed-up is in its seconds over one rank; memory and received bytes are a rank's.

{several_ranks(ranked)}

Predicted, per rank. Strong: the same problem on more ranks. Weak: every rank brings as many queries and candidates as
the problem has, so each searches its candidates for all ranks' queries.

{more_ranks(ranked)}
"""


def main(
    photos: Annotated[Positional[Path], tyro.conf.arg(help="Folder of photographs.")],
    /,
    *,
    to: str,
    train: int = 60_000,
    test: int = 12_000,
    force: bool = False,
) -> None:
    """Pack patches of photographs, 64x64 in colour.

    Args:
        to: Folder or s3://bucket/prefix to write.
        train: Patches of the training split.
        test: Patches of the test split, of other photographs.
        force: Replace a data set that is there.
    """
    training, testing = photographs(photos)
    splits = {"train": patches(training, train, 0), "test": patches(testing, test, 1)}
    source = Source(name=SETS[12288], kind="image", shape=(3, SIDE, SIDE), labels=(), splits=dict(splits))
    pack(source, to, force=force)


def _images(packed: Path, split: str, most: int, dims: int, scratch: Path) -> Path:
    """The first images of a split, at most `most`, in [-1, 1]."""
    path = scratch / f"{packed.name}-{split}-{most}.npy"
    if not path.exists():
        images = read_split(str(packed), split, limit=most)[0]
        write_rows(path, (scaled(part) for part in images.split(_BATCH)), len(images), dims)
    return path


def _shape(file: BinaryIO) -> tuple[int, int]:
    """(rows, dims) by the header of an .npy, whose end is then the position in the file."""
    np.lib.format.read_magic(file)
    rows, dims = np.lib.format.read_array_header_1_0(file)[0]
    return int(rows), int(dims)


if __name__ == "__main__":
    with exit_on_input_error("match_data"):
        tyro.cli(main)
