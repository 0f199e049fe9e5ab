"""Does the energy tell data from what is not data? AUROC by set of outliers, beside what else could tell.

    python benchmarks/density.py --to benchmarks/results/density

An AUROC is the chance that an outlier scores above a test image: 1 is perfect, 0.5 a coin, 0 takes every outlier for
more like the data than any image of it. Scores: the energy of networks, mean and standard deviation over seeds; how far
the mean brightness is from the data's; the distance to the nearest training image. Outliers: Fashion-MNIST's test
images, all black, other constants (every shade but black), uniform noise, inverted digits, digits upside down, and a
digit that is left out of training. For that last column networks are trained anew on the data without it. All on the
recipe of mnist_imle.yaml, also with a code of 128 values, and NAIGN with all digits also on that of
mnist_imle_long.yaml.

Runs are kept under runs/tables as table.py's are, and so is what `--to` has of them already. data/mnist,
data/mnist_without_9 and data/fashion_mnist are packed where they are missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor
from trained import ROOT, Task, measure_all, packed, page, seeds_of, spread, stored, table, write

from pipeline.data.loader import read_split
from pipeline.errors import InputError, exit_on_input_error
from pipeline.evaluate.coverage import nearest
from pipeline.evaluate.density import auroc
from pipeline.model.naign import NAIGN
from pipeline.model.scale import scaled

HELD_OUT = "9"
FAST, PLAIN = "configs/mnist_imle.yaml", ("--objective.denoising=0", "--objective.third=none")
LONGER, SHORTER = "NAIGN, mnist_imle_long.yaml", "NAIGN, mnist_imle.yaml"
CONFIGURATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    LONGER: ("configs/mnist_imle_long.yaml", ()),
    SHORTER: (FAST, ()),
    "NAIGN, reconstruction and IMLE alone": (FAST, PLAIN),
    "autoencoder": (FAST, ("--objective.imle=0", *PLAIN)),
    "denoising autoencoder": (FAST, ("--objective.imle=0", "--objective.third=none")),
    "normalised autoencoder": ("configs/mnist_nae.yaml", ()),
}
NETWORKS = CONFIGURATIONS | {
    f"{name}, code 128": (config, (*options, "--model.code=128"))
    for name, (config, options) in CONFIGURATIONS.items()
    if name != LONGER  # it has that code anyway
}
OFTEN, TIMES = ", f applied five times", 5
"""Another score of the networks of mnist_imle_long.yaml: how far from an image f leaves it in the end."""
CODES = ", distance to the nearest training code"
"""Another one of those of mnist_imle.yaml: in the code that f decodes, by angle."""
TURNED = "upside down"
Score = Callable[[Tensor], Tensor]
Sets = dict[str, tuple[Tensor, Tensor]]
"""Test images and outliers, by the outliers' name."""
Found = dict[str, dict[str, dict[str, float]]]
"""By row, and by run or data set, AUROC by outliers beside the count; nothing but that of a run that diverged."""
COUNT = "test images"


@dataclass(kw_only=True, slots=True)
class Settings:
    """Make the table."""

    to: Path = Path("benchmarks/results/density")
    """Where to write, without an ending."""
    seeds: int = 3
    """Seeds of each network."""
    train: bool = True
    """Train what is missing; otherwise the table is of what is there."""
    held_out: bool = True
    """Also train on the data without one digit."""
    count: int = 2500
    """Test images, and outliers of each kind."""
    jobs: int = 2
    """Runs at a time."""
    images: int = 0
    """Train every network on so many images; 0: as its configuration says."""
    runs: Path = Path("runs/tables")
    """Where the runs lie."""


def outliers(count: int) -> Sets:
    """All but the digit that is left out."""
    test, labels = read_split(str(ROOT / "data/mnist"), "test", limit=10_000)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:count]
    images, digits = scaled(test[order]), torch.as_tensor(labels)[order]
    fashion, _ = read_split(packed("data/fashion_mnist", "fashion_mnist"), "test", limit=count)
    shades = torch.linspace(-1, 1, 256)[1:].view(-1, 1, 1, 1).expand(-1, *images.shape[1:])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = {
        "Fashion-MNIST": scaled(fashion),
        "black": torch.full_like(images[:1], -1.0),
        "other constants": shades,
        "uniform noise": noise,
        "inverted": -images,
        TURNED: images.flip(2),
        **{f"{TURNED}: {digit}": images[digits == digit].flip(2) for digit in range(10)},
    }
    return {name: (images, batch) for name, batch in found.items()}


def held_out(count: int) -> Sets:
    """Test images without the digit, and those of the digit."""
    test, labels = read_split(str(ROOT / "data/mnist"), "test", limit=10_000)
    out = torch.as_tensor(labels) == int(HELD_OUT)
    return {f"the {HELD_OUT}, left out": (scaled(test[~out])[:count], scaled(test[out]))}


def distance_to(train: Tensor) -> Score:
    """To the nearest of the images, (n, *shape) in storage type."""
    reference = scaled(train)
    return lambda batch: nearest(batch, reference)[0]


def code_distance(model: NAIGN, train: Tensor) -> Score:
    """Of the code of an image to the nearest code of the images, (n, *shape) in storage type; codes of unit length."""

    def codes(batch: Tensor) -> Tensor:
        network = model.network
        found = [network.decoder[0](network.encode(part)) for part in batch.split(1000)]
        return torch.nn.functional.normalize(torch.cat(found))

    reference = codes(scaled(train))
    return lambda batch: nearest(codes(batch), reference)[0]


def dimness(train: Tensor) -> Score:
    """How far the mean brightness is from that of the images, (n, *shape) in storage type."""
    typical = float(train.double().mean()) / 127.5 - 1
    return lambda batch: (batch.flatten(1).mean(1) - typical).abs()


def cells(found: Found, titles: list[str]) -> list[list[str]]:
    """Rows of a table of the sets named, of what was measured on any of them."""
    lines = list[list[str]]()
    networks = [f"{name}{score}" for name in NETWORKS for score in ("", OFTEN, CODES)]
    for name in [*networks, "nearest training image", "brightness"]:
        runs = found.get(name, {})
        by_title = [[row[title] for row in runs.values() if title in row] for title in titles]
        seeds, lost = max(map(len, by_title)), sum({*row} == {COUNT} for row in runs.values())
        if seeds or lost:
            few = [seeds_of(len(values)) if 0 < len(values) < seeds else "" for values in by_title]
            who = name + (seeds_of(seeds, lost) if name in networks else "")
            lines.append([who, *(spread(values, 3) + note for values, note in zip(by_title, few, strict=True))])
    return lines


def main(settings: Settings) -> None:
    if settings.seeds < 1 or settings.count < 1 or settings.jobs < 1:
        raise InputError("--seeds, --count and --jobs must be at least 1")
    there: Found = stored(settings.to, dict)
    if not all(isinstance(runs, dict) for runs in there.values() for runs in runs.values()):
        raise InputError(f"{settings.to}.json is not what this table rests on: write --to another place")
    whole = (packed("data/mnist", "mnist"), outliers(settings.count))
    parts = [whole]
    if settings.held_out:
        less = packed("data/mnist_without_9", "mnist", "--without", HELD_OUT)
        parts.append((less, held_out(settings.count)))
    found: Found = {}

    def measured(score: Score, sets: Sets) -> dict[str, float]:
        return {COUNT: settings.count} | {name: auroc(score(one), score(other)) for name, (one, other) in sets.items()}

    for data, sets in parts:
        train, _ = read_split(str(ROOT / data), "train", limit=100_000)
        for name, score in {"brightness": dimness(train), "nearest training image": distance_to(train)}.items():
            found.setdefault(name, {})[data] = measured(score, sets)
        tasks, owners = dict[str, Task](), dict[str, str]()
        for seed in range(settings.seeds):
            for name, (config, options) in NETWORKS.items():
                if name == LONGER and data != "data/mnist":
                    continue
                more = [f"--data.path={data}"] * (data != "data/mnist")
                more += [f"--train.images={settings.images}"] * bool(settings.images)
                task = Task.of(settings.runs, config, [*options, *more], seed)
                run = task.folder.name
                known = [row for row, runs in there.items() if runs.get(run, {COUNT: 0}).get(COUNT) == settings.count]
                for row in known:
                    found.setdefault(row, {})[run] = there[row][run]
                if task.measured or (settings.train and not known):
                    tasks[run], owners[run] = task, name
        for run, record in measure_all(tasks, settings.jobs):
            if "failed" in record:
                found.setdefault(owners[run], {})[run] = {COUNT: settings.count}
                continue
            model = NAIGN.from_pretrained(tasks[run].folder)
            scores = {owners[run]: model.energy}
            if owners[run] == LONGER:
                scores[f"{LONGER}{OFTEN}"] = partial(model.energy, times=TIMES)
            if owners[run].startswith(SHORTER):
                scores[f"{owners[run]}{CODES}"] = code_distance(model, train)
            for row, score in scores.items():
                found.setdefault(row, {})[run] = measured(score, sets)
    if not set(NETWORKS) & found.keys():
        raise InputError(f"no network of this table is in {settings.runs}: leave out --no-train")
    titles = [name for _, sets in parts for name in sets if ":" not in name]
    text = page("AUROC, MNIST", ["", *titles], cells(found, titles))
    turned = {f"{TURNED}: {digit}": str(digit) for digit in range(10)}
    text += f"\nDigits upside down, by digit\n\n{table(['', *turned.values()], cells(found, list(turned)))}\n"
    write(settings.to, text, {row: there.get(row, {}) | found.get(row, {}) for row in {**there, **found}})
    print(text)


if __name__ == "__main__":
    with exit_on_input_error("density"):
        main(tyro.cli(Settings))
