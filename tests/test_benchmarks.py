"""The benchmark scripts run; what they show is in benchmarks/results."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from pipeline.config import parse
from pipeline.model.naign import NAIGN
from pipeline.model.networks import NetworkConfig, build_network
from tests.conftest import ROOT, environment


@pytest.mark.slow
def test_match_measures_every_method_and_two_ranks(digits: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits)
    config = NetworkConfig(width=8, code=16)
    model = {"model": asdict(config), "shape": [1, 8, 8], "latents": "smooth4"}
    NAIGN(build_network(config, (1, 8, 8)), model).save_pretrained(tmp_path / "runs/digits")
    options = ["--quick", "--dims", "64", "--kinds", "untrained", "--ranks", "1", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/match.py"), *options, "--scratch", "scratch", "--to", "results/match"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (problem,) = json.loads((tmp_path / "results/match.json").read_text())["problems"].values()
    assert (problem["queries"], problem["candidates"]) == (240, 480)
    for method in ("flat", "projected", "rounded", "auto"):
        assert problem["methods"][method]["wrong"] == 0
    assert {"sgemm", "faiss.knn", "IndexFlatL2", "cdist", "HNSW"} <= set(problem["methods"])
    for ranks in ("1", "2"):
        assert problem["ranks"][ranks]["auto"]["wrong"] == 0 and problem["ranks"][ranks]["peers"]["memory"] >= 0
    assert problem["ranks"]["2"]["auto"]["received"] < problem["ranks"]["2"]["peers"]["received"]
    assert problem["model"]["weak 1024"]["memory"] > 0
    assert done.stdout.strip() == (tmp_path / "results/match.md").read_text().strip()


@pytest.mark.slow
def test_data_measures_readers_of_a_folder_and_of_a_server(tmp_path: Path) -> None:
    options = ["--quick", "--sets", "grey28", "--only", "ours", "mosaic", "decode", "--no-large", "--mosaic", "absent"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/data.py"), *options, "--scratch", "scratch", "--to", "results/data"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "results/data.json").read_text())["sets"]["grey28"]
    rows = {(row["where"], row["title"]): row for row in measured["rows"]}
    for where in ("folder", "S3"):
        assert rows[where, "ours"]["images"] == 6000 and rows[where, "ours"]["bytes"] > measured["bytes"]
        assert rows[where, "mosaicml-streaming"]["missing"] == "pip install mosaicml-streaming"
    assert rows["memory", "Pillow"]["seconds"] > 0 and rows["memory", "Pillow"]["floor"]
    assert done.stdout.strip() == (tmp_path / "results/data.md").read_text().strip()


@pytest.mark.slow
def test_step_measures_the_fit_checkpoints_and_resumption(tmp_path: Path) -> None:
    options = ["--quick", "--scratch", "scratch", "--to", "results/step"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/step.py"), *options],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/step.json").read_text())
    for row in results["fit"].values():
        assert row["ratio"][1] > 0 and row["cpu"][1] > 0
        assert row["ours"]["memory"] > 0 and row["bare"]["memory"] > 0
    assert len(results["fit"]) == 2
    for row in results["checkpoint"].values():
        assert row["bytes"] > 12 * row["parameters"] and len(row["still"]) == len(row["written"]) == 2
    assert len(results["checkpoint"]) == 2
    assert all(seconds > 0 for (seconds,) in results["resume"].values())
    assert done.stdout.strip() == (tmp_path / "results/step.md").read_text().strip()
    assert not any((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_round_draws_what_two_ranks_did(digits: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/round.py"), "--data", digits, "--to", "results/round"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    spent = {row[0]: dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[2:]}
    assert list(spent) == ["take", "match", "fit"]
    assert spent["fit"]["backward"] > 0 and spent["match"]["forward"] > 0 and spent["match"]["backward"] == 0
    assert (tmp_path / "results/round.png").stat().st_size > 1000


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_row_and_trial_is_a_configuration(file: Path) -> None:
    said = yaml.safe_load(file.read_text())
    if "trials" in said:
        commands = [(said["base"], [*said.get("common", []), *options]) for options in said["trials"].values()]
    else:
        commands = [(row["config"], row.get("options", [])) for row in said["rows"].values() if "config" in row]
    assert commands
    for config, options in commands:
        parse([f"--config={ROOT / config}", *options])


@pytest.mark.slow
def test_table_of_two_seeds_beside_printed_numbers(digits: str, tmp_path: Path) -> None:
    options = [f"--data.path={digits}", "--model.width=8", "--match.round=512", "--train.images=2048"]
    wild = ["--objective.distance=l2", "--train.lr=1e18", "--train.clip=1e18", "--train.warmup=0"]
    rows = {
        "ours": {"config": "configs/digits.yaml", "options": options},
        "wild": {"config": "configs/digits.yaml", "options": [*options, *wild]},
        "printed": {"printed": {"blur": 0.15}},
        "absent": {"config": "configs/digits.yaml", "options": ["--data.path=data/absent"]},
    }
    said = {"title": "A table", "seeds": [0, 1], "columns": ["once", "rarest", "blur", "late"], "rows": rows}
    file = tmp_path / "table.yaml"
    file.write_text(json.dumps(said | {"answers": ["input"], "packed": {"data/absent": ["nothing"]}}))
    command = [sys.executable, str(ROOT / "benchmarks/table.py"), str(file), "--to", str(tmp_path / "made")]
    command += ["--runs", str(tmp_path / "runs")]
    for _ in range(2):  # nothing is done twice
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
        assert [line[0] for line in lines[2:]] == [
            "ours (2 seeds)",
            "wild (0 seeds; 2 of 2 diverged)",
            "printed",
            "answering with input",
        ]
        assert "data/absent cannot be packed" in done.stderr
        assert " ± " in lines[2][1] and lines[3][1] == "-" and lines[4][3] == "0.15" and lines[5][1] == "-"
        for folder in (tmp_path / "runs").iterdir():
            for checkpoint in (folder / "checkpoints").glob("step-*"):
                shutil.rmtree(checkpoint)
    file.write_text(json.dumps(said | {"seeds": [0, 1, 2]}))  # the third is not there
    done = subprocess.run([*command, "--no-train"], env=environment(), capture_output=True, text=True, timeout=60)
    assert "ours (2 seeds)" in done.stdout and "2 of 2 diverged" in done.stdout and done.returncode == 0, done.stderr
    file.write_text(json.dumps(said | {"seeds": [7]}))
    done = subprocess.run([*command, "--no-train"], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "nothing of" in done.stderr


@pytest.mark.slow
def test_search_keeps_the_best_and_goes_on(digits: str, tmp_path: Path) -> None:
    trials = {"as it is": [], "worse": ["--train.lr=1e-9"]}
    options = [f"--data.path={digits}", "--model.width=8", "--match.round=512", "--train.warmup=0"]
    file = tmp_path / "search.yaml"
    said = {"base": "configs/digits.yaml", "images": [4096, 8192], "keep": 0.5}
    file.write_text(json.dumps(said | {"trials": {name: [*options, *own] for name, own in trials.items()}}))

    def search(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(ROOT / "benchmarks/search.py"),
            str(file),
            "--to",
            str(tmp_path / "found"),
            *more,
        ]
        return subprocess.run(
            [*command, "--runs", str(tmp_path / "runs")], env=environment(), capture_output=True, text=True, timeout=300
        )

    early = search("--rung", "1")
    assert early.returncode == 2 and "rung 0 is not done" in early.stderr
    done = search()
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "runs")
    assert search().returncode == 0 and not (tmp_path / "runs").exists()  # nothing is done twice
    done = search("--rung", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [name for name in found if name.endswith("rung 1")] == ["as it is, rung 1"]
    assert done.stdout.strip() == (tmp_path / "found.md").read_text().strip()
