"""`naign runs` and `naign compare` on folders as training, evaluation, kills and strangers leave them."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from PIL import Image

from naign.cli.cluster import fetch
from naign.cli.main import main
from naign.cli.runs import compare, runs
from naign.config import Config, to_dict
from naign.errors import InputError
from naign.evaluate.compare import read_sides, settings_that_differ
from naign.evaluate.runs import find_runs
from tests.conftest import SMALL

ROUND = 256  # images


def a_run(folder, seen, *, checkpoint=None, evaluated=0.0, age=60, **settings):
    """A folder as a run of 4 rounds leaves it, that has seen and kept so many images."""
    folder.mkdir(parents=True)
    config = Config()
    config.match.round = ROUND
    config.train.batch = 32
    config.train.images = 1000
    for key, value in settings.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
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
        fd = {"once": 4 * evaluated, "once_ratio": evaluated, "floor": 4.0}
        metrics = {"fd": fd, "coverage": {"recall": 0.9}, "images_seen": seen, "dataset": "digits"}
        (folder / "evaluation/metrics.json").write_text(json.dumps(metrics))
        Image.new("L", (8, 8), 90).save(folder / "evaluation/samples.png")
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
    assert {name: run["state"] for name, run in found.items()} == {
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
    assert (killed["fd"], killed["measured"], killed["measured_at"]) == (48.0, "training", 512)
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
        lines.append(f"{name}: &{name} {{{', '.join(f'k{n}: *{before}' for n in range(repeated))}}}")
    return "\n".join([*lines, last])


BROKEN = {
    "empty": "",
    "list": "- 1",
    "pickle": "!!python/object/apply:os.system ['true']",
    "zero": "train: {images: 10, passes: 0}\nmatch: {round: 10}",
    "bomb": aliases("a: &a {x: 1, y: 2}", "z: *l", 2),
    "hollow": aliases("a: &a {}", "z: *l", 9),
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


HOSTILE = [
    "[]",
    "{}",
    '{"fd": {"once": NaN}}',
    '{"fd": 5}',
    "\0",
    '{"fd": {"once": "x"}, "images_seen": -1}',
    "[" * 9999,
]


@pytest.mark.parametrize("name", ["evaluation/metrics.json", "checkpoints/step-00000016/trainer.json", "metrics.jsonl"])
def test_files_of_a_run_may_hold_anything(tmp_path, name):
    folder = a_run(tmp_path / "run", 512, checkpoint=512, evaluated=2.0)
    other = a_run(tmp_path / "other", 256)
    for text in HOSTILE:
        (folder / name).write_text(f"{text}\n")
        found, others = find_runs(folder)
        if others:  # that file alone takes a line
            assert not found
            assert others[str(folder)].startswith("its files are not those of a run")
            if text in ("[]", "\0"):
                assert f"{folder / name} holds no JSON object" in others[str(folder)]
            with pytest.raises(InputError, match="run' cannot be compared: "):
                read_sides([folder, other])
        else:
            assert found[0].fd in (8.0, 48.0)  # of the evaluation, or of the last measurement while training
            read_sides([folder, other])


def test_strange_names_and_values_are_printed(tmp_path, capsys):
    one = a_run(tmp_path / "o\udcffne", 512, data__index="s3://me:p@one@host/x")
    two = a_run(tmp_path / "two", 512, data__index="s3://me:p@two@host/x")
    compare((one, two))
    out = capsys.readouterr().out
    assert "o?ne" in out
    assert "two" in out
    assert "data.index" not in out
    assert "://me" not in out


def test_evaluations_that_differ_or_lack_are_named(tmp_path, capsys):
    one = a_run(tmp_path / "one", 512, evaluated=1.5)
    other = a_run(tmp_path / "other", 512, evaluated=1.5)
    metrics = json.loads((one / "evaluation/metrics.json").read_text())
    (one / "evaluation/metrics.json").write_text(json.dumps({**metrics, "dataset": "x", "counts": {"test": 3}}))
    compare((one, other, a_run(tmp_path / "third", 512)))
    text = capsys.readouterr().out
    assert "not the same for all: data set, test examples; distances do not compare" in text
    assert text.count("was not evaluated") == 1
    assert f"third was not evaluated: run `naign evaluate {tmp_path}/third`" in text


def test_an_exported_model_is_compared_once_it_is_evaluated(tmp_path):
    run = a_run(tmp_path / "run", 512, evaluated=1.5)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"exported model: .* after `naign evaluate .*/model`"):
        read_sides([run, model])
    shutil.copytree(run / "evaluation", model / "evaluation")
    (model / "config.json").write_text(json.dumps({"config": {"train": {"lr": 0.5}}}))
    sides = read_sides([run, model])
    assert sides[1].state == "model"
    assert settings_that_differ(sides)["train.lr"] == ["0.002", "0.5"]


def test_runs_are_compared_side_by_side(tmp_path, capsys):
    one = a_run(tmp_path / "one", 1024, checkpoint=1024, evaluated=1.5, train__lr=0.5)
    other = a_run(tmp_path / "other", 768, checkpoint=768, evaluated=2.5)
    compare((one, other, a_run(tmp_path / "third", 512)))
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert rows[:3] == [
        ["run", "one", "other", "third"],
        ["state", "done", "stopped", "unknown"],
        ["images seen", "1,024", "768", "512"],
    ]
    assert ["FD of f(z), × floor", "1.50*", "2.50", "–"] in rows
    assert ["floor", "4.00", "4.00", "–"] in rows
    assert ["recall", "0.900*", "0.900*", "–"] in rows
    settings = rows[rows.index([""]) + 1 :]
    assert settings[:2] == [["setting", "one", "other", "third"], ["train.lr", "0.5", "0.002", "0.002"]]


@pytest.mark.parametrize(
    ("folders", "problem"),
    [
        (["one"], "1 runs given"),
        (["one", "two", "two/../one"], "given twice"),
        (["one", "photos"], "photos' cannot be compared: no run in it"),
        (["one", "s3://bucket/run"], "`naign fetch` copies one"),
        (["one", "nowhere"], "nowhere' cannot be compared: No such file or directory"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, monkeypatch, capsys, folders, problem):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "one", 512)
    a_run(tmp_path / "two", 512)
    (tmp_path / "photos").mkdir()
    monkeypatch.setattr(sys, "argv", ["naign", "compare", *folders])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert problem in err
    assert not out


@pytest.mark.slow
def test_a_run_of_the_real_program_and_its_copy(train, tmp_path, digits, capsys):
    options = [f"--data.path={digits}", "--quality.rounds=1", "--train.images=512", *SMALL]
    done = train(f"--run.path={tmp_path}/runs/a", f"--run.remote={tmp_path}/bucket", *options)
    assert done.returncode == 0, done.stderr
    fetch(f"{tmp_path}/bucket", to=tmp_path / "runs/fetched")
    capsys.readouterr()
    found = listed(tmp_path / "runs", capsys)
    for name in ("a", "fetched"):
        run = found[name]
        assert (run["state"], run["images_seen"], run["images"]) == ("done", 512, 512)
        assert (run["measured"], run["measured_at"], run["fd"]) == ("training", 512, found["a"]["fd"])
