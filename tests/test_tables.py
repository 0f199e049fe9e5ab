"""Tables and searches: what they refuse before hours of training, that runs are shared, and what they make."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from naign.errors import InputError
from tests.conftest import forked

pytestmark = pytest.mark.usefixtures("benchmarks")

DIGITS = "configs/digits.yaml"
SOUND = {
    "title": "A table",
    "seeds": [0, 1],
    "columns": ["once"],
    "rows": {"ours": {"config": DIGITS, "options": ["--train.lr=1e-3"]}},
}
SEARCH = {
    "base": DIGITS,
    "images": [1024],
    "keep": 0.5,
    "trials": {"as it is": []},
}


@pytest.fixture
def forked_programs(monkeypatch):
    """What is trained and evaluated inherits this environment."""
    for name, value in forked().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def table():
    import table

    return table


@pytest.fixture
def search():
    import search

    return search


@pytest.fixture
def trained():
    import trained

    return trained


@pytest.fixture
def plan(table, tmp_path):
    """Writes the file of a table; the settings with which it is made."""

    def plan(said):
        file = tmp_path / "table.yaml"
        file.write_text(json.dumps(said))
        return table.Settings(file=file, to=tmp_path / "made", runs=tmp_path / "runs")

    return plan


def cells(text):
    """The rows of a table in Markdown, below its titles."""
    found = []
    for line in text.splitlines():
        if "|" in line:
            found.append([cell.strip() for cell in line.split("|")[1:-1]])
    return found[2:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": ["fid"]}, "no columns fid"),
        ({"answers": ["medain"]}, "no answers medain"),
        ({"seeds": [0.9, True]}, "whole numbers"),
        ({"rows": {}}, "needs seeds and rows"),
        ({"rows": {"a": {"config": DIGITS, "printed": {"blur": 1}}}}, "or has printed alone"),
        ({"rows": {"a": {"config": DIGITS, "options": "--seed=3"}}}, "options must be a list"),
        ({"comon": ["--seed=3"]}, "comon"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(table, plan, change, said):
    assert table.Plan.read(plan(SOUND).file).seeds == [0, 1]
    file = plan(SOUND | change).file
    with pytest.raises(InputError, match=f"is not a table.*{said}"):
        table.Plan.read(file)


@pytest.mark.parametrize(
    "change",
    [
        {"images": "20"},
        {"keep": float("nan")},
        {"trials": {"a": "b"}},
    ],
)
def test_a_search_that_cannot_be_made_is_refused(search, tmp_path, change):
    file = tmp_path / "search.yaml"
    file.write_text(json.dumps(SEARCH))
    assert search.Search.read(file).images == [1024]
    file.write_text(yaml.safe_dump(SEARCH | change))
    with pytest.raises(InputError, match="is not a search"):
        search.Search.read(file)


def test_a_run_is_named_after_what_it_computes(trained, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("train: {images: 1000}\n")

    def task(*options, seed=0, then=()):
        return trained.Task.of(
            Path("runs"),
            str(config),
            options,
            seed,
            then,
        )

    first = task()
    assert task() == first
    assert task("--train.threads=2").folder == first.folder
    assert task("--train.images=1000").folder == first.folder
    export = task(then=["naign.cli", "export"])
    assert export.trained == first.folder
    others = [task("--train.lr=3e-3"), task("--train.precision=bf16"), task(seed=1), export]
    config.write_text("train: {images: 2000}\n")
    others.append(task())
    names = {other.folder for other in others}
    assert len(names) == 5
    assert first.folder not in names


@pytest.mark.parametrize("options", [["--help"], ["--train.batch=0.5"], ["--match.ratio=-1"]])
def test_an_option_that_is_invalid_is_named_with_its_row(table, plan, options):
    settings = plan(SOUND | {"common": options})
    with pytest.raises(InputError, match=r"table.yaml: row 'ours'"):
        table.main(settings)


def test_runs_that_are_a_file_are_named(trained, tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(InputError, match="runs.*: Not a directory"):
        trained.Task.of(tmp_path / "runs", DIGITS, [], 0).measure()


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_run_whose_numbers_are_damaged_is_named(trained, tmp_path, text):
    task = trained.Task.of(tmp_path, DIGITS, [], 0)
    (task.folder / "evaluation").mkdir(parents=True)
    (task.folder / "evaluation/metrics.json").write_text(text)
    (task.folder / "evaluation/samples.json").write_text("{}")
    with pytest.raises(InputError, match=f"{task.folder.name}, and it is trained anew"):
        task.measure()


def test_numbers_outlive_the_run_they_came_from(table, plan, trained, tmp_path, capsys):
    made = tmp_path / "made.json"
    settings = plan(SOUND)
    records = []
    for seed, ratio in ((0, 2), (1, 4), (2, 60)):
        task = trained.Task.of(settings.runs, DIGITS, ["--train.lr=1e-3"], seed)
        records.append({"run": task.folder.name, "fd": {"once_ratio": ratio}})
    made.write_text(json.dumps({"ours": records, "of a row that is gone": records[:1]}))

    table.main(settings)  # has no need to train
    assert "| ours (2 seeds) | 3.0 ± 1.4 |" in capsys.readouterr().out
    assert json.loads(made.read_text()) == {"ours": records, "of a row that is gone": records[:1]}
    assert not settings.runs.exists()

    settings.seeds = 1
    table.main(settings)
    assert "| ours (1 seed) | 2.0 |" in capsys.readouterr().out

    plan(SOUND | {"common": ["--train.clip=0.7"]})
    table.main(settings)
    assert "'ours', seed 0: its numbers are of other settings" in capsys.readouterr().err

    made.unlink()
    settings.train = False
    with pytest.raises(InputError, match="leave out --no-train"):
        table.main(settings)


@pytest.mark.parametrize(
    ("there", "to", "said"),
    [
        ('{"name": "another program"}', "made", "made.json does not hold the numbers of a table"),
        ('{"ours": [1]}', "made", "a record of the table names no run"),
        ('{"a": [', "made", "made.json: .*move it away"),
        ("{}", "v1.2", "without an ending"),
        ("{}", "made.json/x", "made.json"),
    ],
)
def test_a_table_is_not_written_over_something_else(table, plan, tmp_path, there, to, said):
    made = tmp_path / "made.json"
    made.write_text(there)
    settings = plan(SOUND)
    settings.to = tmp_path / to
    with pytest.raises(InputError, match=said):
        table.main(settings)
    assert made.read_text() == there
    assert not settings.runs.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_programs")
def test_table_of_a_run_a_model_made_of_it_and_one_that_diverges(table, plan, digits, tmp_path, capfd):
    wild = ["--objective.distance=l2", "--train.lr=1e18", "--train.clip=1e18", "--train.warmup=0"]
    said = {
        "title": "A table",
        "seeds": [0],
        "columns": ["latents", "once", "blur", "training"],
        "rows": {
            "ours": {"config": DIGITS},
            "exported": {
                "config": DIGITS,
                "then": ["naign.cli", "export"],
            },
            "wild": {"config": DIGITS, "options": wild},
            "printed": {"printed": {"blur": 0.15}},
            "absent": {"config": DIGITS, "options": ["--data.path=data/absent"]},
        },
        "common": [f"--data.path={digits}", "--model.width=8", "--match.round=512", "--train.images=1024"],
        "answers": ["input"],
        "packed": {"data/absent": ["nothing"]},
    }
    settings = plan(said)
    table.main(settings)
    told = capfd.readouterr()
    assert "data/absent cannot be packed" in told.err
    ours, made, lost, printed, answer = cells(told.out)
    assert ours[0] == "ours (1 seed)"
    assert made[0] == "exported (1 seed)"
    assert answer[0] == "answering with input"
    assert ours[1] == "-"  # without a prior there is no other sampler
    assert made[1:] == ours[1:]
    assert lost == ["wild (0 seeds; 1 of 1 diverged)", "-", "-", "-", "-"]
    assert printed[3] == "0.15"
    assert len(list(settings.runs.glob("*/checkpoints"))) == 1
    assert len(list(settings.runs.iterdir())) == 3

    for folder in settings.runs.iterdir():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (tmp_path / "made.json").unlink()
    table.main(settings)  # nothing is trained twice
    assert cells(capfd.readouterr().out) == [ours, made, lost, printed, answer]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_programs")
def test_search_keeps_the_best_and_goes_on(search, digits, tmp_path, capsys):
    options = [f"--data.path={digits}", "--model.width=8", "--match.round=512", "--train.warmup=0"]
    said = {
        "base": DIGITS,
        "images": [4096, 8192],
        "keep": 0.5,
        "common": options,
        "trials": {"as it is": [], "worse": ["--train.lr=1e-9"]},
    }
    file = tmp_path / "search.yaml"
    file.write_text(json.dumps(said))
    runs = tmp_path / "runs"

    def of_rung(rung):
        search.main(search.Settings(file=file, to=tmp_path / "found", rung=rung, runs=runs))
        return capsys.readouterr().out

    with pytest.raises(InputError, match="rung 0 is not done"):
        of_rung(1)
    first = of_rung(0)
    shutil.rmtree(runs)
    assert of_rung(0) == first
    assert not runs.exists()  # nothing is done twice
    printed = of_rung(1)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [name for name in found if name.endswith("rung 1")] == ["as it is, rung 1"]
    assert printed.strip() == (tmp_path / "found.md").read_text().strip()
