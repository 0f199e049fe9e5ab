"""One statement says one thing: tokens a line of code, and assignments of several things at once."""

import ast
import io
import tokenize

import pytest

from tests.conftest import ROOT

TOKENS = {"pipeline": 8.5, "tests": 9, "benchmarks": 8.6}
"""The most tokens a line of code, on average: without comments, docstrings and layout."""

PACKED = 4
"""The most assignments such as `a, b = x, y` per 1,000 statements."""

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def is_text(node):
    """Whether a statement is a string alone, as docstrings are."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_packed(node):
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


@pytest.mark.parametrize("folder", TOKENS)
def test_code_is_not_packed(folder):
    tokens = 0
    lines = 0
    statements = 0
    packed = 0
    for file in (ROOT / folder).rglob("*.py"):
        text = file.read_text()
        nodes = list(ast.walk(ast.parse(text)))
        statements += sum(isinstance(node, ast.stmt) for node in nodes)
        packed += sum(is_packed(node) for node in nodes)
        texts = set()
        for node in filter(is_text, nodes):
            texts.update(range(node.lineno, node.end_lineno + 1))
        rows = []
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in LAYOUT and token.start[0] not in texts:
                rows.append(token.start[0])
        tokens += len(rows)
        lines += len(set(rows))
    assert tokens / lines <= TOKENS[folder], f"{folder}: {tokens / lines:.2f} tokens a line of code"
    assert 1000 * packed / statements <= PACKED
