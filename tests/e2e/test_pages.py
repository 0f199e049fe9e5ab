"""Blocks on the pages run or name what they need; their commands are ones that the programs take."""

import functools
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from naign.cli.main import COMMANDS
from naign.cluster.launch import build_parser
from naign.cluster.ranks import AUDIT
from naign.config import parse
from naign.data.format.writer import pack
from naign.data.sources.catalog import load
from naign.data.sources.source import Made
from tests.conftest import forked
from tests.pages import NEEDS, PAGES, ROOT, blocks, commands, settings
from tests.programs import execute, succeeded

CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def parsed(words):
    """Parse a command of a page as its program would. InputError or SystemExit if it would be refused."""
    if words[:2] == ["accelerate", "launch"]:
        parse(settings(words))
        return
    if words[0] == "torchrun" and "naign.cli" in words:
        words = words[words.index("naign.cli") :]
    elif words[0] != "naign":
        return
    rest = words[1:]
    if rest[0] in ("train", "launch"):
        rest = build_parser().parse_known_args(rest[1:])[1]
        if not rest or rest[0] != AUDIT:
            parse(rest)
            return
    if rest[0] not in ("--version", "--help", "--tyro-print-completion"):
        stubs = {}
        for name, command in COMMANDS.items():
            stubs[name] = functools.wraps(command)(lambda *_, **__: None)
        tyro.extras.subcommand_cli_from_dict(stubs, args=rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_name_what_they_need_and_their_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        assert set(block.needs) <= set(NEEDS), f"{block.where} needs {block.needs}: choose from {NEEDS}"
        if block.language != "bash":
            assert not re.search("^naign ", block.text, re.MULTILINE), f"{block.where}: use bash"
            continue
        if "package" in block.needs:  # whose names are not known here
            continue
        for words in commands(block.text):
            try:
                parsed(words)
            except (Exception, SystemExit) as error:
                if "not installed" in str(error) and "network" in block.needs:
                    continue  # pip install in this block
                pytest.fail(f"{block.where}: {shlex.join(words)}: {error}")


def test_a_wrong_option_or_setting_on_a_page_is_found():
    script = "A=1 naign sample runs/a --nn 3 >x 2>&1 && echo 'a b' | naign train \\\n --train.rl=1  # it's wrong\n"
    sample, _, train = commands(script)
    assert train == ["naign", "train", "--train.rl=1"]
    assert sample[-2:] == ["--nn", "3"]
    for words in (sample, train):
        with pytest.raises(SystemExit):
            parsed(words)


def enlarged(name, size, channels, labels):
    """A data set of that name, made of 320 training and 80 test digits."""
    digits = load("digits")

    def split(examples, length):
        def make(row):
            key, image, label = examples[row]
            scale = -(-size // 8)
            large = np.kron(image.repeat(channels, 0), np.ones((1, scale, scale), np.uint8))
            return key, large[:, :size, :size], label

        return Made(length=length, make=make)

    splits = {"train": split(digits.splits["train"], 320), "test": split(digits.splits["test"], 80)}
    return replace(
        digits,
        name=name,
        shape=(channels, size, size),
        labels=labels,
        splits=splits,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the pages suppose: data sets, pictures, a trained run, and the programs in bin/."""
    folder = tmp_path_factory.mktemp("pages")
    numbers = tuple("0123456789")
    for source in (
        load("digits"),
        enlarged("mnist", 28, 1, numbers),
        enlarged("fashion_mnist", 28, 1, CLOTHES),
        enlarged("cifar10", 32, 3, numbers),
    ):
        pack(source, str(folder / "data" / source.name), shards=4)
    random = np.random.default_rng(0)

    def picture(path, size, *channels):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        levels = random.integers(0, 256, (8, 8, *channels), dtype=np.uint8)
        Image.fromarray(levels).resize((size, size)).save(folder / path)

    for row in range(30):
        picture(f"my/pictures/cats/{row}.png", 80, 3)
        picture(f"my/pictures/dogs/{row}.png", 80, 3)
    for path in ("photos/a.png", "photos/b.png", "photo.png", "photo.jpg", "damaged.png"):
        picture(path, 28)
    Image.fromarray(np.uint8(255) * (np.indices((28, 28)).sum(0) < 20)).save(folder / "hole.png")
    for name in ("benchmarks", "configs", "k8s", "launch", "pipeline"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    (folder / "bin").mkdir()
    for name in ("naign", "accelerate", "torchrun"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.pages {name} "$@"\n')
        program.chmod(0o755)
    run_block("naign train", folder)
    return folder


def run_block(text, folder):
    """Run a shell script as a user of the page would, its programs with small settings."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-eo", "pipefail", "-c", text]
    env = forked(PATH=path)
    succeeded(execute(command, folder, env=env, timeout=600))


def given():
    """Names that programs on the pages leave to the reader."""
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    return {
        "images": images,
        "held_out": images,
        "queries": torch.rand(5, 7),
        "candidates": torch.rand(9, 7),
        "rank": 0,
        "train_step": lambda *_: None,
        "network": torch.nn.Flatten(),
        "state": None,
    }


def runnable(page):
    """The blocks of a page that need nothing that tests lack."""
    return [block for block in blocks(page) if not block.needs and block.language in ("bash", "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(runnable, PAGES)), ids=lambda page: page.name)
def test_blocks_of_a_page_run(page, prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    names = given()
    for block in runnable(page):
        try:
            if block.language == "python":
                exec(compile(block.text, block.where, "exec"), names)
            else:
                run_block(block.text, tmp_path)
        except Exception as error:
            pytest.fail(f"{block.where}: {type(error).__name__}: {error}")
