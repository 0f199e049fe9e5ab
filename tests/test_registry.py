"""Choices with a name that other packages add: what is wrong with them is told, whatever their code does."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from naign.errors import InputError
from naign.model import networks
from naign.model.losses import OBJECTIVES
from naign.settings.registry import lookup

FOREIGN = ModuleType("foreign_choices")
sys.modules["foreign_choices"] = FOREIGN


def found(monkeypatch, value, group, builtin):
    point = EntryPoint("other", value, group)
    monkeypatch.setattr(
        "naign.settings.registry._entry_points", lambda asked: {"other": point} if asked == group else {}
    )
    return lookup("some.name", "other", builtin, group)


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        (None, "NoneType, not a settings class and a function"),
        ((networks.ConvConfig,), "tuple, not a settings class and a function"),
        ((int, len), "tuple, not a settings class and a function"),
        ((networks.ConvConfig, 3), "tuple, not a settings class and a function"),
    ],
)
@pytest.mark.parametrize(
    ("builtin", "group"), [(networks.NETWORKS, "naign.networks"), (OBJECTIVES, "naign.objectives")]
)
def test_what_has_another_form_is_refused(monkeypatch, entry, wanted, builtin, group):
    monkeypatch.setattr(FOREIGN, "ENTRY", entry, raising=False)
    with pytest.raises(InputError, match=f"some.name is 'other', .* brings as foreign_choices:ENTRY, .*{wanted}"):
        found(monkeypatch, "foreign_choices:ENTRY", group, builtin)


def test_a_package_that_exits_while_it_is_imported_does_not_end_the_program(monkeypatch, tmp_path):
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="importing that failed: SystemExit: 0"):
        found(monkeypatch, "exits_on_import:ENTRY", "naign.networks", networks.NETWORKS)


def test_an_unknown_name_cannot_write_to_the_terminal():
    with pytest.raises(InputError, match=r"report.trackers is '_\[2Jx': choose one of jsonl"):
        lookup("report.trackers", "\033[2Jx", {"jsonl": len}, "naign.trackers")
