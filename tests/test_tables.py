"""What the benchmarks refuse before they train for hours, and what they hold for the same run."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.errors import InputError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import table

        yield table
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


SOUND = {
    "title": "A table",
    "seeds": [0, 1],
    "columns": ["once"],
    "rows": {"ours": {"config": "configs/digits.yaml", "options": ["--train.lr=1e-3"]}},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": ["fid"]}, "no columns fid"),
        ({"answers": ["medain"]}, "no answers medain"),
        ({"seeds": [0, 0]}, "seeds that differ"),
        ({"seeds": []}, "seeds that differ"),
        ({"rows": {}}, "needs rows"),
        ({"rows": {"a": {"config": "configs/digits.yaml", "printed": {}}}}, "or have printed alone"),
        ({"rows": {"a": {"config": "configs/digits.yaml", "options": "--seed=3"}}}, "must be a list"),
        ({"rows": {"a": {"printed": {"blurr": 1}}}}, "no columns blurr"),
        ({"seeds": "none"}, "is no table"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(table, tmp_path, change, said):
    file = tmp_path / "table.yaml"
    file.write_text(json.dumps(SOUND))
    assert table.Plan.read(file).seeds == [0, 1]
    file.write_text(json.dumps(SOUND | change))
    with pytest.raises(InputError, match=said):
        table.Plan.read(file)


def test_a_run_is_named_after_what_it_computes(table, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("train: {images: 1000}\n")
    first = table.Task.of(Path("runs"), str(config), [], 0)
    assert table.Task.of(Path("runs"), str(config), [], 0) == first
    assert table.Task.of(Path("runs"), str(config), ["--train.threads=2"], 0).folder == first.folder
    assert table.Task.of(Path("runs"), str(config), ["--train.images=1000"], 0).folder == first.folder
    others = [
        table.Task.of(Path("runs"), str(config), options, 0) for options in (["--train.lr=3e-3"], ["--train.lr=3"])
    ]
    others.append(table.Task.of(Path("runs"), str(config), ["--train.precision=bf16"], 0))
    others.append(table.Task.of(Path("runs"), str(config), [], 1))
    config.write_text("train: {images: 2000}\n")
    others.append(table.Task.of(Path("runs"), str(config), [], 0))
    assert len({first.folder, *(other.folder for other in others)}) == 1 + len(others)
    with pytest.raises(InputError, match="no configuration file"):
        table.Task.of(Path("runs"), "configs/absent.yaml", [], 0)


def test_numbers_outlive_the_run_they_came_from(table, tmp_path, capsys):
    file, runs = tmp_path / "table.yaml", tmp_path / "runs"
    file.write_text(json.dumps(SOUND))
    names = [table.Task.of(runs, "configs/digits.yaml", ["--train.lr=1e-3"], seed).folder.name for seed in (0, 1, 2)]
    rows = [{"run": name, "fd": {"once_ratio": found}} for name, found in zip(names, (2, 4, 60), strict=True)]
    (tmp_path / "another.json").write_text(json.dumps({"also ours": rows, "not": {"a": "run"}}))
    table.main(table.Settings(file=file, to=tmp_path / "made", runs=runs))  # has no need to train
    assert "| ours (2 seeds) | 3.0 ± 1.4 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "made.json").read_text()) == {"ours": rows[:2]}
    assert not runs.exists()
    (tmp_path / "another.json").unlink()
    (tmp_path / "made.json").unlink()
    with pytest.raises(InputError, match="leave out --no-train"):
        table.main(table.Settings(file=file, to=tmp_path / "made", runs=runs, train=False))
