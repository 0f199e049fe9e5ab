"""Blocks of code on pages, the commands in them, and small stand-ins for the programs that these start.

A block that cannot run in a test has a comment directly above its fence that names what it needs (`NEEDS`):

    <!-- needs: gpu, network -->
    ```bash

All others run, in the order of the page: tests/e2e/test_pages.py. `python -m tests.pages NAME ARGUMENTS` is the program
that `naign`, `accelerate` or `torchrun` starts there, with settings so small that it takes seconds.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from tests import forks

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NEEDS = ("gpu", "kubectl", "docker", "cluster", "s3", "hub", "network", "hours", "browser", "package")
"""What tests lack. cluster: several hosts, or Slurm. browser: a server that runs until it is stopped. package: the one
that the page shows, which tests/test_extend.py installs."""

FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]*) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)

REDIRECTION = re.compile(r"(?<!\S)\d?[<>]+(&\d|\s*\S+)")

TRAINING = (
    *("--train.images=512", "--match.round=64", "--match.ratio=1", "--train.batch=32", "--train.warmup=64"),
    *("--train.threads=1", "--train.passes=1", "--report.pictures=0", "--model.width=8"),
)
LEARNED = {
    "flow": ("--prior.width=16", "--prior.depth=1", "--prior.passes=1", "--prior.batch=32", "--prior.images=128"),
    "gmm": ("--prior.components=3", "--prior.images=128"),
}
PROGRAMS = {
    "naign": "naign.cli",
    "accelerate": "accelerate.commands.accelerate_cli",
    "torchrun": "torch.distributed.run",
}
PACKED = ("mnist", "fashion_mnist", "cifar10")
"""Data sets that `naign pack` would download; test_pages.py packs small ones in their place."""


class Block(NamedTuple):
    where: str  # page and line of the fence
    language: str
    text: str
    needs: tuple[str, ...]


def blocks(page):
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        needs = ()
        if match["needs"] is not None:
            needs = tuple(match["needs"].split(", "))
        found.append(Block(f"{page.name}:{line}", match["language"], match["text"], needs))
    return found


def commands(text):
    """The words of each simple command of a shell script, without assignments and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(REDIRECTION.sub("", line), posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|()"):  # the end of a command
                if words:
                    yield words
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)


def settings(words):
    """The arguments that follow the program of a training in `accelerate launch ... pipeline/train.py ...`."""
    return words[words.index("pipeline/train.py") + 1 :]


def smaller(words):
    """What to add to the arguments of a program, the last of equal options being the one that counts."""
    if "copies" in words:
        return ["--samples", "40"]
    if "evaluate" in words:
        return ["--samples", "40", "--encoder", "pixels"]  # and not one of ImageNet, which takes ten seconds
    if words[:1] not in (["train"], ["launch"]):
        return []
    recipe = "mnist"
    if "--config" in words:
        recipe = words[words.index("--config") + 1]
    file = Path(recipe)
    if not file.is_file():
        file = ROOT / f"configs/{recipe}.yaml"
    prior = re.search(r"name: (flow|gmm)", file.read_text())
    if prior:
        return [*TRAINING, *LEARNED[prior[1]]]
    return [*TRAINING]


def start(name, words):
    """Run a program that a page starts; returns its exit status."""
    if name == "naign" and words[:1] == ["pack"] and words[1] in PACKED:
        return 0
    with forks.Popen([sys.executable, "-m", PROGRAMS[name], *words, *smaller(words)]) as program:
        return program.wait()


if __name__ == "__main__":
    sys.exit(start(sys.argv[1], sys.argv[2:]))
