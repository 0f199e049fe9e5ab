"""The benchmark scripts run; what they show is in benchmarks/results."""

import json
import re
import sys
from typing import get_args

import pytest
import torch
import yaml

from naign.config import parse
from naign.errors import InputError
from naign.model.networks import ConvConfig
from tests.conftest import ROOT, SMALL, environment
from tests.programs import execute, succeeded


@pytest.fixture
def start(tmp_path):
    """Starts a benchmark, a line of words."""

    def start(line, env=None):
        name, *options = line.split()
        return execute([sys.executable, str(ROOT / f"benchmarks/{name}.py"), *options], tmp_path, env=env)

    return start


@pytest.fixture
def run(start, tmp_path):
    """The numbers of a benchmark that writes to `made`, and prints what it writes."""

    def run(line, env=None):
        done = succeeded(start(f"{line} --to made", env))
        assert done.stdout.strip() == (tmp_path / "made.md").read_text().strip()
        return json.loads((tmp_path / "made.json").read_text())

    return run


@pytest.mark.slow
def test_match_compares_with_faiss(run, save_untrained, digits, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits)
    save_untrained(tmp_path / "runs/digits", data=None, shape=(1, 8, 8), config=ConvConfig(width=8, code=16))
    problems = "--dims 64 --kinds untrained --queries 240 --candidates 480"
    found = run(f"match {problems} --checked 100 --repeats 1")
    (problem,) = found["problems"].values()
    assert problem["queries"] == 240
    assert problem["candidates"] == 480
    assert set(problem["methods"]) == {"faiss.knn", "HNSW", "Panorama", "auto"}
    assert problem["methods"]["auto"]["wrong"] == 0


@pytest.mark.slow
def test_a_curve_has_a_row_for_each_checkpoint(run, train, digits, tmp_path):
    options = ["--checkpoint.rounds=2", "--checkpoint.keep=0", "--train.images=1536", "--prior.name=none"]
    succeeded(train(*SMALL, f"--data.path={digits}", "--run.path=run", *options))
    found = run(f"curve --runs run --data {digits} --encoder digits-cnn64 --count 300")
    (rows,) = found.values()
    assert [row[1] for row in rows] == [0.512, 1.024, 1.536]
    assert rows[0][0] < rows[1][0] < rows[2][0]
    for row in rows:
        assert row[2] > 1 and row[7] > 1 and 0 <= row[4] <= 1


def test_right_answers_are_those_of_float64(benchmarks):
    from match import right_answers

    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(20, 5, generator=generator)
    candidates = torch.randn(9000, 5, generator=generator)
    candidates[5000] = candidates[17]  # of equals the first is right
    queries[3] = candidates[17]
    distances = torch.cdist(queries.double(), candidates.double())
    exact = distances.argmin(1)
    exact[3] = 17
    assert right_answers(queries, candidates).tolist() == exact.tolist()


@pytest.mark.slow
def test_neighbours_compares_with_faiss(run, digits):
    problem = f"--data {digits} --queries 2000 --candidates 20000 --window 4 8"
    found = run(f"neighbours {problem} --threads 1", environment())
    assert found["methods"]["ours"]["recall"] == 1
    assert found["methods"]["hnsw"]["effort"] >= 16


@pytest.mark.slow
def test_recipes_fit_the_memory_that_they_ask_for(run):
    found = run("budget --configs folder64 folder256", environment())
    for name, most in (("folder64", 12), ("folder256", 16)):
        recipe = (ROOT / f"configs/{name}.yaml").read_text()
        assert f"a GPU with {most} GB" in recipe
        needed = found[name]["gigabytes"][-1]
        assert 0.3 * most < needed < most - 1.5  # for CUDA and what its allocator wastes
    besides = found["folder256"]["gigabytes"][1]
    assert found["folder256 --train.recompute"]["gigabytes"][1] < 0.5 * besides


@pytest.mark.slow
def test_data_measures_readers_of_a_folder_and_of_a_server(run):
    found = run("data --quick --sets grey28 --peers absent --scratch scratch")
    measured = found["sets"]["grey28"]
    assert measured["images"] == 6000
    for row in measured["rows"]:
        if row["title"] == "mosaicml-streaming":
            assert row["missing"] == "`pip install mosaicml-streaming`"
        else:
            assert row["seconds"] > 0


def test_scale_predicts_what_the_page_says(run):
    costs = run("scale")["costs"]
    assert len(costs) == 9
    page = (ROOT / "benchmarks/results/scale.md").read_text()
    for gpus, lost in ((8, "0.0014"), (1024, "0.41"), (4096, "4.4")):
        found = costs[f"{gpus} 1000000000"]
        assert f"{found['losses: of the time, %']:.3g}" == lost and f" {lost} |" in page
        assert f"{found['round, s']:.3g}" == "2.87" and "| round, s | 2.87 | 2.87 | 2.87 |" in page
        assert found["match: memory a rank, GB"] < 2


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_row_and_trial_is_a_configuration(file):
    said = yaml.safe_load(file.read_text())
    common = said.get("common", [])
    commands = []
    for options in said.get("trials", {}).values():
        commands.append((said["base"], options))
    for row in said.get("rows", {}).values():
        if "config" in row:
            commands.append((row["config"], row.get("options", [])))
    assert commands
    for config, options in commands:
        parse([f"--config={ROOT / config}", *common, *options])


@pytest.mark.slow
def test_the_first_hour_with_a_gpu_can_be_tried_without_one(start, tmp_path, benchmarks):
    from gpu import Part

    done = start("gpu --device=cpu --small --to=gpu")
    lines = json.loads((tmp_path / "gpu.json").read_text())["lines"]
    assert {line["part"] for line in lines} == {*get_args(Part)}
    assert [line for line in lines if not line["holds"]] == [], done.stderr
    assert done.returncode == 0


def test_a_part_that_fails_is_a_line_and_an_exit_code(tmp_path, benchmarks, monkeypatch):
    from gpu import Settings, main

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # which main() sets: later tests must not inherit it
    settings = Settings(
        to=tmp_path / "gpu",
        device="cpu",
        small=True,
        parts=("random",),
        minutes=1e-9,
    )
    assert main(settings) == 1
    assert "| random | not begun |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_first_hour_with_a_gpu_needs_one(tmp_path, benchmarks):
    from gpu import Settings, main

    with pytest.raises(InputError, match="no CUDA device"):
        main(Settings(to=tmp_path / "other"))
    assert not (tmp_path / "other.md").exists()


def test_the_head_of_the_script_for_gpus_names_every_part(benchmarks):
    import gpu

    named = re.findall(r"^    (\w+) {2,}", gpu.__doc__, re.MULTILINE)
    assert named == [*get_args(gpu.Part)]
