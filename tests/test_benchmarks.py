"""The benchmark scripts run; what they show is in benchmarks/results."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from naign.config import parse
from naign.errors import InputError
from naign.model.naign import NAIGN
from naign.model.networks import ConvConfig, build_network
from tests.conftest import ROOT, environment, forked


def run(name: str, *options: str, cwd: Path, env: dict[str, str], timeout: int) -> subprocess.CompletedProcess[str]:
    """A benchmark that must succeed, within so many seconds."""
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *options]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_match_measures_every_method_and_two_ranks(digits: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits)
    config = ConvConfig(width=8, code=16)
    model = {"model": asdict(config), "shape": [1, 8, 8], "prior": {"name": "smooth", "grid": 4}}
    NAIGN(build_network(config, (1, 8, 8)), model).save_pretrained(tmp_path / "runs/digits")
    options = ["--quick", "--dims", "64", "--kinds", "untrained", "--ranks", "1", "2"]
    done = run(
        "match", *options, "--scratch", "scratch", "--to", "results/match", cwd=tmp_path, env=forked(), timeout=120
    )
    (problem,) = json.loads((tmp_path / "results/match.json").read_text())["problems"].values()
    assert (problem["queries"], problem["candidates"]) == (240, 480)
    for method in ("flat", "projected", "rounded", "auto"):
        assert problem["methods"][method]["wrong"] == 0
    assert {"sgemm", "faiss.knn", "IndexFlatL2", "cdist", "HNSW"} <= set(problem["methods"])
    for ranks in ("1", "2"):
        assert problem["ranks"][ranks]["auto"]["wrong"] == 0
    assert problem["ranks"]["2"]["auto"]["received"] < problem["ranks"]["2"]["peers"]["received"]
    assert problem["model"]["weak 1024"]["memory"] > 0
    assert done.stdout.strip() == (tmp_path / "results/match.md").read_text().strip()


@pytest.mark.slow
def test_neighbours_compares_with_faiss(digits: str, tmp_path: Path) -> None:
    options = ["--quick", "--data", digits, "--window", "4", "8", "--to", "neighbours", "--threads", "1"]
    done = run("neighbours", *options, cwd=tmp_path, env=environment(), timeout=300)
    methods = json.loads((tmp_path / "neighbours.json").read_text())["methods"]
    assert methods["ours"]["recall"] == 1 and methods["hnsw"]["effort"] >= 16
    assert done.stdout.strip() == (tmp_path / "neighbours.md").read_text().strip()


@pytest.mark.slow
def test_recipes_fit_the_memory_that_they_ask_for(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), "--configs", "folder64", "folder256"]
    done = subprocess.run(
        [*command, "--to", "memory"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = {name: row["gigabytes"] for name, row in json.loads((tmp_path / "memory.json").read_text()).items()}
    found = {name: row[-1] for name, row in parts.items()}
    for name, most in (("folder64", 8), ("folder256", 12)):
        assert f"a GPU with {most} GB" in (ROOT / f"configs/{name}.yaml").read_text()
        assert 0.3 * most < found[name] < most - 1.5  # for CUDA itself and what its allocator wastes
    assert (
        parts["folder256 --train.recompute"][1] < 0.5 * parts["folder256"][1]
    )  # what a step holds besides the weights


@pytest.mark.slow
def test_data_measures_readers_of_a_folder_and_of_a_server(tmp_path: Path) -> None:
    options = ["--quick", "--sets", "grey28", "--only", "ours", "mosaic", "decode", "--no-large", "--peers", "absent"]
    done = run(
        "data", *options, "--scratch", "scratch", "--to", "results/data", cwd=tmp_path, env=forked(), timeout=120
    )
    measured = json.loads((tmp_path / "results/data.json").read_text())["sets"]["grey28"]
    rows = {(row["where"], row["title"]): row for row in measured["rows"]}
    for where in ("folder", "S3"):
        assert rows[where, "ours"]["images"] == 6000 and rows[where, "ours"]["bytes"] > measured["bytes"]
        assert rows[where, "mosaicml-streaming"]["missing"] == "pip install mosaicml-streaming"
    assert rows["memory", "Pillow"]["seconds"] > 0 and rows["memory", "Pillow"]["floor"]
    assert done.stdout.strip() == (tmp_path / "results/data.md").read_text().strip()


@pytest.mark.slow
@pytest.mark.timeout(450)  # seven real starts
def test_step_measures_the_fit_checkpoints_and_resumption(tmp_path: Path) -> None:
    options = ["--quick", "--scratch", "scratch", "--to", "results/step"]
    done = run("step", *options, cwd=tmp_path, env=forked(), timeout=400)
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
    options = ["--options", "match.round=512", "train.images=3072", "model.width=8", "model.code=16", "match.block=64"]
    done = run("round", "--data", digits, "--to", "results/round", *options, cwd=tmp_path, env=forked(), timeout=200)
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
def test_scale_predicts_what_two_ranks_measure(tmp_path: Path) -> None:
    done = run("scale", "--quick", "--to", "results/scale", cwd=tmp_path, env=forked(), timeout=300)
    results = json.loads((tmp_path / "results/scale.json").read_text())
    exact = {row["what"]: row for row in results["checked"] if row["ranks"] == 2 and row["unit"] == "MB"}
    for what in ("fit: sent", "match: received", "checkpoint: written by rank 0"):
        assert exact[what]["measured"] == pytest.approx(exact[what]["predicted"], rel=0.05), what
    assert all(row["shards"] * 10_000 == row["images"] for row in results["plans"]) and len(results["costs"]) == 9
    assert done.stdout.strip() == (tmp_path / "results/scale.md").read_text().strip()


@pytest.mark.slow
def test_the_first_minutes_on_a_gpu_can_be_tried_without_one(tmp_path: Path, benchmarks: None) -> None:
    from gpu_report import Part

    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device=cpu", "--small", "--to=gpu"]
    done = subprocess.run(command, cwd=tmp_path, env=forked(), capture_output=True, text=True, check=False)
    lines = json.loads((tmp_path / "gpu.json").read_text())["lines"]
    assert {line["part"] for line in lines} == {*get_args(Part)}
    assert done.returncode == 0 and all(line["holds"] for line in lines), done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_first_minutes_on_a_gpu_need_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    with pytest.raises(InputError, match="no CUDA device"):
        gpu.main(gpu.Settings(to=tmp_path / "other"))
    assert not (tmp_path / "other.md").exists()


def test_the_head_of_the_script_for_gpus_names_every_part(benchmarks: None) -> None:
    import gpu
    from gpu_report import Part

    assert re.findall(r"^    (\w+) {2,}", gpu.__doc__ or "", re.MULTILINE) == [*get_args(Part)]
