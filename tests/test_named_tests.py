"""Tests that pages name as `tests/FILE.py::NAME` exist."""

import re

from tests.conftest import ROOT

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_tests_that_pages_name_exist() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    named = {pair for page in pages for pair in NAMED.findall(page.read_text())}
    assert len(named) >= 20
    assert not [pair for pair in named if not re.search(rf"^def {pair[1]}\(", (ROOT / pair[0]).read_text(), re.M)]
