"""Tables and searches: what they refuse before they train for hours, hold for the same run, and make."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from naign.errors import InputError
from tests.conftest import ROOT, forked

pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def forked_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained and evaluated inherits this environment."""
    for name, value in forked().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def table() -> ModuleType:
    import table

    return table


@pytest.fixture
def search() -> ModuleType:
    import search

    return search


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
        ({"rows": {"a": {"config": "configs/digits.yaml", "then": "naign.cli export"}}}, "then must be a list"),
        ({"rows": {"a": {"printed": {}, "then": ["naign.cli"]}}}, "or have printed alone"),
        ({"rows": {"a": {"printed": {"blurr": 1}}}}, "no columns blurr"),
        ({"seeds": "none"}, "is no table"),
        ({"common": "--seed=3"}, "common must be a list"),
        ({"comon": ["--seed=3"]}, "it says comon"),
        ({"seeds": [0.9, True]}, "seeds must be whole numbers"),
        ({"rows": {"a": {"printed": ["once"]}}}, "printed must name columns"),
        ({"answers": [["input"]]}, "no answers"),
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
    others.append(table.Task.of(Path("runs"), str(config), [], 0, ["naign.cli", "export"]))
    assert others[-1].trained == first.folder
    config.write_text("train: {images: 2000}\n")
    others.append(table.Task.of(Path("runs"), str(config), [], 0))
    assert len({first.folder, *(other.folder for other in others)}) == 1 + len(others)
    with pytest.raises(InputError, match="no configuration file"):
        table.Task.of(Path("runs"), "configs/absent.yaml", [], 0)


@pytest.mark.parametrize("name", ["generation", "stability", "ablation", "generation_fashion"])
def test_committed_numbers_are_those_of_runs_that_the_table_names(table, tmp_path, name):
    """Else a new setting, or another default, would have all of them trained anew."""
    plan = table.Plan.read(ROOT / f"benchmarks/{name}.yaml")
    stored = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    rows = [row for row in plan.rows if stored.get(row) and "config" in plan.rows[row]]
    for row in rows:
        options, config = [*plan.common, *plan.rows[row].get("options", [])], plan.rows[row]["config"]
        runs = {record["run"] for record in stored[row]}
        assert any(table.Task.of(tmp_path, config, options, seed).folder.name in runs for seed in plan.seeds), row
    assert len(rows) > 2


@pytest.mark.parametrize("options", [["--help"], ["--train.batch=0.5"], ["--match.ratio=-1"]])
def test_an_option_that_is_none_is_named_with_its_row(table, tmp_path, options):
    file = tmp_path / "table.yaml"
    file.write_text(json.dumps(SOUND | {"common": options}))
    with pytest.raises(InputError, match=r"table.yaml: row 'ours'"):
        table.main(table.Settings(file=file, to=tmp_path / "made", runs=tmp_path / "runs"))


@pytest.mark.parametrize(
    "lines", ["", '{"loss/total": 1', "[1]", '{"loss/total": "low"}', *(f'{{"loss/total": {x}}}\n' * 9 for x in "0∞")]
)
def test_losses_that_say_nothing_stop_no_table(tmp_path, lines):
    import trained

    (tmp_path / "metrics.jsonl").write_text(lines.replace("∞", "Infinity"))
    assert trained.late(tmp_path / "metrics.jsonl") is None
    assert trained.late(tmp_path / "absent") is None


def test_runs_that_are_a_file_are_named(table, tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(InputError, match="runs.*: Not a directory"):
        table.Task.of(tmp_path / "runs", "configs/digits.yaml", [], 0).measure()


@pytest.mark.parametrize("text", ["{", "[1]", "{}", "5"])
def test_a_run_whose_numbers_are_damaged_is_named(table, tmp_path, text):
    task = table.Task.of(tmp_path, "configs/digits.yaml", [], 0)
    (task.folder / "evaluation").mkdir(parents=True)
    (task.folder / "evaluation/metrics.json").write_text(text)
    with pytest.raises(InputError, match=f"{task.folder.name}, and it is trained anew"):
        task.measure()


def test_a_run_that_is_trained_is_not_trained_again(table, tmp_path, monkeypatch):
    commands = list[list[str]]()
    monkeypatch.setattr(table.Task, "_do", lambda task, command, folder: commands.append(command))
    task = table.Task.of(tmp_path, "configs/digits.yaml", [], 0)
    assert not task.ended
    task.train()
    task.train()
    assert task.ended and len(commands) == 1


def test_numbers_outlive_the_run_they_came_from(table, tmp_path, capsys):
    file, runs = tmp_path / "table.yaml", tmp_path / "runs"
    file.write_text(json.dumps(SOUND))
    names = [table.Task.of(runs, "configs/digits.yaml", ["--train.lr=1e-3"], seed).folder.name for seed in (0, 1, 2)]
    nothing = dict.fromkeys(table.KEPT)
    rows = [{"run": name, **nothing, "fd": {"once_ratio": x}} for name, x in zip(names, (2, 4, 60), strict=True)]
    (tmp_path / "another.json").write_text(json.dumps({"also ours": rows, "not": {"a": "run"}, "less": [{"run": "x"}]}))
    for number, text in enumerate(('{"a": [', "", "[1]", "5", '{"a": 5}', '{"a": [1, null, ["run"]]}', "[" * 3000)):
        (tmp_path / f"foreign-{number}.json").write_text(text)
    table.main(table.Settings(file=file, to=tmp_path / "made", runs=runs))  # has no need to train
    assert "| ours (2 seeds) | 3.0 ± 1.4 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "made.json").read_text()) == {"ours": rows[:2]}
    assert not runs.exists()

    (tmp_path / "another.json").write_text(json.dumps({"old": [{**rows[0], "fd": {"once_ratio": 9}}]}))
    table.main(table.Settings(file=file, to=tmp_path / "made", runs=runs, seeds=1))
    assert "| ours (1 seed) | 2.0 |" in capsys.readouterr().out  # its own number, not another's
    assert json.loads((tmp_path / "made.json").read_text()) == {"ours": rows[:1], table.NOT_SHOWN: rows[1:2]}
    table.main(table.Settings(file=file, to=tmp_path / "made", runs=runs))
    assert "| ours (2 seeds) | 3.0 ± 1.4 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "made.json").read_text()) == {"ours": rows[:2]}

    (tmp_path / "another.json").unlink()
    (tmp_path / "made.json").unlink()
    with pytest.raises(InputError, match="leave out --no-train"):
        table.main(table.Settings(file=file, to=tmp_path / "made", runs=runs, train=False))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_programs")
def test_table_of_two_seeds_beside_printed_numbers(table, digits, tmp_path, capfd):
    options = [f"--data.path={digits}", "--model.width=8", "--match.round=512", "--train.images=2048"]
    wild = ["--objective.distance=l2", "--train.lr=1e18", "--train.clip=1e18", "--train.warmup=0"]
    rows = {
        "ours": {"config": "configs/digits.yaml"},
        "wild": {"config": "configs/digits.yaml", "options": wild},
        "printed": {"printed": {"blur": 0.15}},
        "absent": {"config": "configs/digits.yaml", "options": ["--data.path=data/absent"]},
    }
    said = {"title": "A table", "seeds": [0, 1], "columns": ["once", "rarest", "blur", "late"], "rows": rows}
    said |= {"common": options, "answers": ["input"], "packed": {"data/absent": ["nothing"]}}
    file, runs = tmp_path / "table.yaml", tmp_path / "runs"

    def made(seeds: list[int], to: str = "made", *, train: bool = True) -> tuple[list[list[str]], str]:
        file.write_text(json.dumps(said | {"seeds": seeds}))
        table.main(table.Settings(file=file, to=tmp_path / to, runs=runs, train=train))
        told = capfd.readouterr()
        return [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in told.out.splitlines() if "|" in line
        ], told.err

    lines, warned = made([0, 1])
    names = ["ours (2 seeds)", "wild (0 seeds; 2 of 2 diverged)", "printed", "answering with input"]
    assert [line[0] for line in lines[2:]] == names
    assert "data/absent cannot be packed" in warned
    assert " ± " in lines[2][1] and lines[3][1] == "-" and lines[4][3] == "0.15" and lines[5][1] == "-"
    for folder in runs.iterdir():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    assert made([0, 1])[0] == lines  # nothing is done twice, here, where no table stands, or with a seed too many
    (tmp_path / "made.json").unlink()
    assert made([0, 1, 2], train=False)[0] == lines
    with pytest.raises(InputError, match="nothing of"):
        made([7], train=False)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_programs")
def test_models_that_are_made_of_one_run_share_its_training(table, digits, tmp_path, capsys):
    options = ["--model.width=8", "--model.evaluations=2", "--match.round=512", "--train.images=1024"]
    row = {"config": "configs/mnist_flow.yaml", "options": [f"--data.path={digits}", *options]}
    rows = {count: row | {"then": ["naign_baselines.solver", f"--evaluations={count}"]} for count in (1, 4)}
    mixed = {"config": "configs/mnist_vae.yaml", "then": ["naign.cli", "export", "--prior=gmm"]}
    mixed["then"] += ["--components=2"]
    few = [f"--data.path={digits}", "--model.width=8", "--model.code=4", "--match.round=512", "--train.images=1024"]
    rows |= {"VAE": mixed | {"options": few}}
    columns = ["latents", "once", "latents_recall", "training", "sampling", "latents_sampling"]
    file, runs = tmp_path / "table.yaml", tmp_path / "runs"
    file.write_text(json.dumps({"title": "A table", "seeds": [0], "columns": columns, "rows": rows}))
    table.main(table.Settings(file=file, to=tmp_path / "made", runs=runs))
    lines = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    one, four, vae = ([None if cell.strip() == "-" else float(cell) for cell in line] for line in lines)
    assert one[0] is one[2] is one[5] is None and one[3] == four[3]
    assert all(value is not None for value in vae) and four[4] > one[4] > 0
    assert len(list(runs.glob("*/checkpoints"))) == 2 and len(list(runs.iterdir())) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("forked_programs")
def test_search_keeps_the_best_and_goes_on(search, digits, tmp_path, capsys):
    trials = {"as it is": [], "worse": ["--train.lr=1e-9"]}
    options = [f"--data.path={digits}", "--model.width=8", "--match.round=512", "--train.warmup=0"]
    said = {"base": "configs/digits.yaml", "images": [4096, 8192], "keep": 0.5}
    file, runs = tmp_path / "search.yaml", tmp_path / "runs"
    file.write_text(json.dumps(said | {"trials": {name: [*options, *own] for name, own in trials.items()}}))

    def of_rung(rung: int) -> str:
        search.main(search.Settings(file=file, to=tmp_path / "found", rung=rung, runs=runs))
        printed: str = capsys.readouterr().out
        return printed

    with pytest.raises(InputError, match="rung 0 is not done"):
        of_rung(1)
    first = of_rung(0)
    shutil.rmtree(runs)
    assert of_rung(0) == first and not runs.exists()  # nothing is done twice
    printed = of_rung(1)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [name for name in found if name.endswith("rung 1")] == ["as it is, rung 1"]
    assert printed.strip() == (tmp_path / "found.md").read_text().strip()


@pytest.mark.parametrize(
    "change", [{"common": "--seed=1"}, {"images": "20"}, {"images": []}, {"keep": float("nan")}, {"trials": {"a": "b"}}]
)
def test_a_search_that_cannot_be_made_is_refused(search, tmp_path, change):
    sound = {"base": "configs/digits.yaml", "images": [1024], "keep": 0.5, "trials": {"as it is": []}}
    (tmp_path / "sound.yaml").write_text(json.dumps(sound))
    assert search.Search.read(tmp_path / "sound.yaml").images == [1024]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(sound | change))
    with pytest.raises(InputError, match="is no search"):
        search.Search.read(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    ("there", "to", "said"),
    [
        ('{"name": "another program"}', "made", "made.json is not what a table rests on"),
        ("[1]", "made", "made.json is not what"),
        ('{"a": [', "made", "made.json: .*move it away"),
        ("{}", "v1.2", "without an ending"),
        ("{}", ".", "without an ending"),
        ("{}", "made.json/x", "made.json"),
    ],
)
def test_a_table_is_not_written_over_something_else(table, tmp_path, monkeypatch, there, to, said):
    monkeypatch.chdir(tmp_path)
    Path("table.yaml").write_text(json.dumps(SOUND))
    Path("made.json").write_text(there)
    with pytest.raises(InputError, match=said):
        table.main(table.Settings(file=Path("table.yaml"), to=Path(to), runs=Path("runs")))
    assert Path("made.json").read_text() == there and not Path("runs").exists()
