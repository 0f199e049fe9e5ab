"""Files and functions are short, and the tree that docs/internals.md draws names what exists."""

import ast
import re

import pytest

from tests.conftest import ROOT

FILE, FUNCTION = 500, 80
"""The most lines."""

SOURCES = sorted(file for folder in ("pipeline", "benchmarks") for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file):
    text = file.read_text()
    long = [
        f"{node.name} has {lines} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION
    ]
    if (lines := len(text.splitlines())) > FILE:
        long.append(f"the file has {lines} lines")
    assert not long


def drawn(tree):
    """The path of each file and folder that begins a line of the tree; folders end with "/" and indentation nests."""
    above = []
    for line in tree.splitlines():
        plain = re.sub("[│├└─]", " ", line)
        indent = len(plain) - len(plain.lstrip())
        names = re.match(r"(?:[\w.*-]+(?:/|\.\w+)(?: |$))*", plain.lstrip())[0].split()
        above = [(width, folder) for width, folder in above if width < indent]
        for name in names:
            yield "".join(folder for _, folder in above) + name
        if names and names[0].endswith("/"):
            above.append((indent, names[0]))


def test_a_tree_names_every_room_and_only_what_exists():
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "docs/internals.md").read_text(), re.M | re.S)
    (tree,) = (block for block in blocks if re.search(r"^\W*pipeline/", block, re.M))
    names = list(drawn(tree))
    assert len(names) > 15 and not [name for name in names if not list(ROOT.glob(name))]
    rooms = {f"pipeline/naign/{init.parent.name}/" for init in ROOT.glob("pipeline/naign/*/__init__.py")}
    assert rooms <= set(names)
