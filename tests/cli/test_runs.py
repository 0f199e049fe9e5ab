"""`naign runs` on folders as training, evaluation, kills and strangers leave them."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from naign.cli.cluster import fetch
from naign.cli.runs import runs
from naign.config import Config, to_dict
from naign.errors import InputError
from naign.evaluate.runs import find_runs
from tests.conftest import SMALL

ROUND = 256  # images


def a_run(folder, seen, *, checkpoint=None, evaluated=0.0, age=60):
    """A folder as a run of 4 rounds leaves it, that has seen and kept so many images."""
    folder.mkdir(parents=True)
    config = Config()
    config.match.round = ROUND
    config.train.batch = 32
    config.train.images = 1000
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with (folder / "metrics.jsonl").open("w") as file:
        for images in range(ROUND, seen + 1, ROUND):
            line = {"images_seen": images, "loss/imle": float("nan"), "time": time.time() - age}
            if images <= 2 * ROUND:
                line |= {"quality/fd": 50.0 - images / ROUND, "quality/recall": 0.5}
            file.write(json.dumps(line) + "\n")
        file.write('{"images_seen": 99999, "cut')
    if checkpoint is not None:
        place = folder / f"checkpoints/step-{checkpoint // 32:08d}"
        place.mkdir(parents=True)
        rounds = checkpoint // ROUND
        trainer = {"round": rounds, "images_seen": checkpoint, "fitted": rounds // 4}
        (place / "trainer.json").write_text(json.dumps(trainer))
        (place / "manifest.json").write_text("{}")
        (folder / ".lock").touch()
    if evaluated:
        (folder / "evaluation").mkdir()
        metrics = {
            "fd": {"once": 4 * evaluated, "once_ratio": evaluated},
            "coverage": {"recall": 0.9},
            "images_seen": seen,
        }
        (folder / "evaluation/metrics.json").write_text(json.dumps(metrics))
    return folder


def listed(folder, capsys):
    """The runs that `naign runs --json` lists, by name."""
    runs(folder, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"folder", "runs", "others"}
    assert not found["others"]
    return {run["name"]: run for run in found["runs"]}


def test_a_folder_of_runs_as_a_table_and_as_json(tmp_path, capsys):
    a_run(tmp_path / "best", 1024, checkpoint=1024, evaluated=1.5, age=7200)
    a_run(tmp_path / "group/killed", 768, checkpoint=512)
    a_run(tmp_path / "copied", 512)
    busy = a_run(tmp_path / "busy", 256, checkpoint=0)
    with FileLock(busy / ".lock"):
        found = listed(tmp_path, capsys)
    states = {name: run["state"] for name, run in found.items()}
    assert states == {
        "best": "done",
        "busy": "training",
        "copied": "unknown",
        "group/killed": "stopped",
    }
    assert list(found) == sorted(found)
    assert found["best"].pop("bytes") > 1000
    assert found["best"].pop("age_seconds") == pytest.approx(7200, abs=600)
    assert found["best"] == {
        "name": "best",
        "path": str(tmp_path / "best"),
        "state": "done",
        "images_seen": 1024,
        "images": 1024,
        "fd": 6.0,
        "fd_over_floor": 1.5,
        "recall": 0.9,
        "measured": "evaluation",
        "measured_at": 1024,
    }
    killed = found["group/killed"]
    assert killed["fd"] == 48.0
    assert killed["measured"] == "training"
    assert killed["measured_at"] == 512
    runs(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "images", "of", "x", "floor", "recall", "FD", "measured", "size", "age"]
    assert re.match(r"best +done +1,024 +1,024 +1\.5 +0\.9 +6 +evaluation +0\.0 MB +[12]:\d\d:\d\d$", lines[1])
    assert "training at 512" in next(line for line in lines if line.startswith("group/killed"))
    assert [run.state for run in find_runs(busy)[0]] == ["stopped"]


def aliases(first, last, repeated):
    """YAML whose anchors, each of so many aliases of the one before, describe a huge document."""
    lines = [first]
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True):
        keys = ", ".join(f"k{n}: *{before}" for n in range(repeated))
        lines.append(f"{name}: &{name} {{{keys}}}")
    return "\n".join([*lines, last])


BROKEN = {
    "empty": "",
    "list": "- 1",
    "pickle": "!!python/object/apply:os.system ['true']",
    "zero": "train: {images: 10, passes: 0}\nmatch: {round: 10}",
    "bomb": aliases("a: &a {x: 1, y: 2}", "train: *l", 9),
    "escape\033[2J": "",
}


def test_damaged_runs_take_a_line_each(tmp_path, capsys):
    a_run(tmp_path / "sound", 256, checkpoint=256)
    for name, content in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(content)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/linked").symlink_to(tmp_path / "sound")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    runs(tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("photos/linked")
    assert out[2].startswith("sound")
    named = {line.removeprefix(f"{tmp_path}/").split(": ", 1)[0] for line in out[3:]}
    assert named == {name.replace("\033", "?") for name in BROKEN}
    assert len(out) == 3 + len(BROKEN)


@pytest.mark.parametrize(("folder", "problem"), [("nowhere", "no folder"), ("s3://bucket/runs", "naign fetch")])
def test_a_place_that_is_not_a_folder_is_refused(folder, problem):
    with pytest.raises(InputError, match=problem):
        runs(Path(folder))


HOSTILE = ["[]", '{"fd": {"once": NaN}}', '{"fd": 5}', '{"fd": {"once": "x"}, "images_seen": -1}', "[" * 9999]


@pytest.mark.parametrize("name", ["evaluation/metrics.json", "checkpoints/step-00000016/trainer.json", "metrics.jsonl"])
def test_files_of_a_run_may_hold_anything(tmp_path, name):
    folder = a_run(tmp_path / "run", 512, checkpoint=512, evaluated=2.0)
    for text in HOSTILE:
        (folder / name).write_text(f"{text}\n")
        found, others = find_runs(folder)
        if others:
            assert not found
            assert others[str(folder)].startswith("its files are not those of a run")
        else:
            assert found[0].fd in (8.0, 48.0)  # of the evaluation, or of the last measurement while training
        if text == "[]" and name != "metrics.jsonl":
            assert f"{folder / name} holds no JSON object" in others[str(folder)]


@pytest.mark.slow
def test_a_run_of_the_real_program_and_its_copy(train, tmp_path, digits, capsys):
    options = [f"--data.path={digits}", "--quality.rounds=1", "--quality.samples=50", "--train.images=512", *SMALL]
    done = train(f"--run.path={tmp_path}/runs/a", f"--run.remote={tmp_path}/bucket", *options)
    assert done.returncode == 0, done.stderr
    fetch(f"{tmp_path}/bucket", to=tmp_path / "runs/fetched")
    capsys.readouterr()
    found = listed(tmp_path / "runs", capsys)
    for name in ("a", "fetched"):
        run = found[name]
        assert run["state"] == "done"
        assert run["images_seen"] == run["images"] == 512
        assert run["measured"] == "training"
        assert run["measured_at"] == 512
        assert run["fd"] == found["a"]["fd"]
