"""README is short, each of its numbers comes from benchmarks/results, and its pictures are what their scripts draw."""

import json
import re
from statistics import fmean

from PIL import Image

from naign.data.damage import KINDS
from naign.match import MatchConfig
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network
from tests.conftest import ROOT
from tests.programs import script

LINES = 110
WORDS = 1_150
"""At most."""
NAMES = (
    "CIFAR-10",
    "FSDP2",
    "S3",
    "Python 3.11",
    "[-1, 1]",
    "1 is as good",
    "64 values",
)
"""What holds digits and was not measured."""
AE = "autoencoder, code 64, mixture of 200"


def results(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def mean(table, row, key):
    """Of all runs of a row of a table; `key` is a path with dots."""
    values = []
    for run in results(table)[row]:
        for part in key.split("."):
            run = run[part]
        values.append(run)
    return fmean(values)


def row(table, name):
    """The cells of README's table, from a row of a table of results."""
    cells = [f"{mean(table, name, 'fd.once_ratio'):.1f}"]
    for key in ("input", "once"):
        cells.append(f"{mean(table, name, f'restoration.noise.{key}'):.3f}")
    return [*cells, f"{mean(table, name, 'cpu_seconds'):,.0f}", f"{mean(table, name, 'sampling.cpu_seconds'):,.1f}"]


def kills():
    return len(re.findall(r"^ *\d+\. ", (ROOT / "benchmarks/results/kills.txt").read_text(), re.M))


def installed(torch):
    return f"{results('install')[torch]['bytes'] / 1e9:.1f}"


MNIST = "NAIGN, mnist.yaml"
CIFAR = "autoencoder, flow: cifar10_cpu.yaml"
FASHION = "autoencoder, flow: fashion_mnist.yaml"
IMLE = "f of noise by IMLE, code 128"
ROWS = {
    "MNIST, samples from the prior": ("two_stages", MNIST),
    "Fashion-MNIST, prior, no IMLE": ("two_stages", FASHION),
    "CIFAR-10, prior, no IMLE": ("two_stages", CIFAR),
    "MNIST by IGN (idempotent generative network, adversarial)": ("rivals", "IGN"),
}
"""Of README's table, and where they come from."""
SEEDS = [str(len(results(table)[name])) for table, name in ROWS.values()]
SOURCES = {
    "evaluates in {} minutes": [f"{results('install')['train']['seconds'] / 60:.0f}"],
    "took {} minutes": [f"{results('install')['cuda']['seconds'] / 60:.0f}"],
    "It takes {} GB on Linux": [installed("cuda")],
    "up to {} GB of memory": [f"{results('install')['memory']['evaluate'] / 1e9:.1f}"],
    "or {} GB if you first create `.venv`": [installed("cpu")],
    "MNIST, samples from noise, the same f | {} |": [f"{mean('two_stages', MNIST, 'fd.noise_ratio'):.1f}"],
    "after {} kills": [str(kills())],
    "CIFAR-10 is at {} times the floor": [f"{mean('two_stages', CIFAR, 'fd.once_ratio'):.0f}"],
    "on Fashion-MNIST is at {} times the floor": [f"{mean('rivals_fashion', MNIST, 'fd.noise_ratio'):.0f}"],
    "IMLE on CIFAR-10 at {}": [f"{mean('imle_cifar10', IMLE, 'fd.once_ratio'):.0f}"],
    "with a code of 64 values and a prior is at {} times the floor, NAIGN at {}": [
        f"{mean('rivals', name, 'fd.once_ratio'):.1f}" for name in (AE, MNIST)
    ],
    "only from {} to {}": [f"{mean('two_stages', CIFAR, f'restoration.blur.{key}'):.3f}" for key in ("input", "once")],
    "distance of {} samples to the test": [f"{results('two_stages')[MNIST][0]['sampling']['samples']:,}"],
    "| {} samples, s": [f"{results('two_stages')[MNIST][0]['sampling']['samples']:,}"],
    "means of {}, {}, {}, {} and {} seeds": [SEEDS[0], *SEEDS],
    "A round reads {} images": [f"{MatchConfig().round:,}"],
    "f maps {} noise inputs": [f"{MatchConfig().pool:,}"],
}
"""Words around numbers, and the numbers, as benchmarks/results has them."""
for title, place in ROWS.items():
    SOURCES[f"| {title} | {{}} | {{}} → {{}} | {{}} | {{}} |"] = row(*place)


def unsourced(page):
    """(phrases of SOURCES that are not on the page once, numbers that no phrase accounts for), code aside."""
    page = re.sub(r"^```.*?^```|<!--.*?-->", " ", page, flags=re.M | re.S)
    page = re.sub(r"\]\([^)]*\)", "]", " ".join(page.split()))
    absent = []
    for phrase, numbers in SOURCES.items():
        expected = phrase.format(*numbers)
        if page.count(expected) != 1:
            absent.append(expected)
        page = page.replace(expected, " ")
    for code in re.findall(r"`[^`]*`", page):
        page = page.replace(code, " ")
    for name in NAMES:
        page = page.replace(name, " ")
    return absent, re.findall(r"\S*\d\S*", page)


def test_every_number_has_a_source():
    assert unsourced((ROOT / "README.md").read_text()) == ([], [])


def test_a_number_without_a_source_is_found():
    page = (ROOT / "README.md").read_text()
    assert unsourced(page + "\nIt is 3.7 times as fast.\n") == ([], ["3.7"])
    absent, left = unsourced(page.replace("after 20 kills", "after 30 kills"))
    assert absent == ["after 20 kills"]
    assert left == ["30"]


def test_it_is_short():
    page = (ROOT / "README.md").read_text()
    assert len(page.splitlines()) <= LINES
    assert len(page.split()) <= WORDS


def test_the_drawings_are_those_of_their_scripts(benchmarks):
    diagrams = script("docs/diagrams.py")
    drawn = {name: draw() for name, draw in diagrams.DRAWINGS.items()}
    drawn["cost"] = script("benchmarks/cost.py").picture()
    drawn["ranks"] = script("benchmarks/resize.py").picture(results("resize"))
    for name, picture in drawn.items():
        drawing = (ROOT / f"docs/{name}.svg").read_text()
        assert drawing == picture, f"run docs/diagrams.py, benchmarks/cost.py or resize.py: {name}"
    names = re.findall(r'class="name" text-anchor="middle">(\w+)<', drawn["rooms"])
    assert list(diagrams.ROOMS) == names


def test_the_picture_at_the_top_shows_two_runs_and_a_drawing(tmp_path):
    config = ConvConfig(width=8, code=16)
    model = {"model": {"name": "conv", "width": 8, "code": 16}, "shape": [1, 28, 28]}
    model |= {"latents": {"name": "smooth"}, "prior": {"name": "none"}}
    NAIGN(build_network(config, (1, 28, 28)), model).save_pretrained(tmp_path / "mnist")
    runs = []
    for name, side in (("mnist", 56), ("cifar10_cpu", 64)):
        runs.append(tmp_path / name)
        folder = tmp_path / name / "evaluation"
        folder.mkdir(parents=True)
        cell = side + 3
        grids = {"samples": (16 * cell - 3, 6 * cell - 3)}
        for kind in KINDS:
            grids[f"restoration_{kind}"] = (74 + 10 * cell - 3, 5 * cell - 3)
        for picture, size in grids.items():
            Image.new("RGBA", size, (0, 0, 255, 255)).save(folder / f"{picture}.png")
    pictures = script("benchmarks/pictures.py")
    colours = dict((colour, count) for count, colour in pictures.front(runs).getcolors(1 << 24))
    assert colours[0, 0, 255, 255] == 2 * 20 * pictures.CELL**2
