"""Tests that pages name as `tests/FILE.py::NAME` exist."""

import re

from tests.conftest import ROOT

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_tests_that_pages_name_exist():
    count = 0
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for file, name in NAMED.findall(page.read_text()):
            count += 1
            text = (ROOT / file).read_text()
            assert re.search(rf"^def {name}\(", text, re.M), f"{file}::{name}"
    assert count >= 10
