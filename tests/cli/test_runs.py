"""`naign runs` and `naign compare` on folders as training, evaluation, kills and strangers leave them."""

import itertools
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from PIL import Image

from naign.cli.main import main
from naign.cli.runs import compare, runs
from naign.config import Config, to_dict
from naign.errors import InputError
from naign.evaluate.compare import read_sides, settings_that_differ
from naign.evaluate.runs import find_runs, read_settings
from naign.settings.budget import measured_by
from tests.conftest import SMALL, Program


def a_run(
    folder: Path, seen: int, *, checkpoint: int | None = None, evaluated: float = 0.0, age: float = 60, **settings: Any
) -> Path:
    """A folder as a run of 4 rounds of 256 images leaves it, that has seen and kept so many images."""
    folder.mkdir(parents=True)
    config = Config()
    config.match.round, config.train.batch, config.train.images = 256, 32, 1000
    for key, value in settings.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with (folder / "metrics.jsonl").open("w") as file:
        for images in range(256, seen + 1, 256):
            line = {"images_seen": images, "loss/total": 900 / images, "loss/imle": float("nan"), "match/distance": 3.0}
            quality = {"quality/fd": 50.0 - images / 256, "quality/recall": 0.5} if images <= 512 else {}
            file.write(json.dumps(line | quality | {"time": time.time() - age}) + "\n")
        file.write('{"images_seen": 99999, "cut')
    if checkpoint is not None:
        place = folder / f"checkpoints/step-{checkpoint // 32:08d}"
        place.mkdir(parents=True)
        (place / "trainer.json").write_text(json.dumps({"round": checkpoint // 256, "images_seen": checkpoint}))
        (place / "manifest.json").write_text("{}")
        (folder / ".lock").touch()
    if evaluated:
        (folder / "evaluation").mkdir()
        fd = {"once": 4 * evaluated, "once_ratio": evaluated, "floor": 4.0}
        metrics = {"fd": fd, "coverage": {"recall": 0.9}, "images_seen": seen, "dataset": "digits"}
        (folder / "evaluation/metrics.json").write_text(json.dumps(metrics))
        Image.new("L", (8, 8), 90).save(folder / "evaluation/samples.png")
    return folder


def test_a_folder_of_runs_as_a_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "best", 1024, checkpoint=1024, evaluated=1.5, age=7200)
    a_run(tmp_path / "group/killed", 768, checkpoint=512)
    a_run(tmp_path / "patient", 768, checkpoint=768, quality__rounds=1, quality__patience=2)
    best = {"fd": 49.0, "round": 1, "measured": measured_by(read_settings(tmp_path / "patient"))}
    (tmp_path / "patient/best.json").write_text(json.dumps(best))
    a_run(tmp_path / "copied", 512)
    busy = a_run(tmp_path / "busy", 256, checkpoint=0)
    with FileLock(busy / ".lock"):
        runs(tmp_path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"folder", "runs", "others"} and not found["others"]
    by_name = {run.pop("name"): run for run in found["runs"]}
    states = {name: run["state"] for name, run in by_name.items()}
    assert states == {
        **{"best": "done", "patient": "done", "busy": "training", "group/killed": "stopped", "copied": "unknown"}
    }
    assert list(by_name) == sorted(by_name) and by_name["best"].pop("bytes") > 1000
    assert by_name["best"].pop("age_seconds") == pytest.approx(7200, abs=600)
    assert by_name["best"] == {
        **{"path": str(tmp_path / "best"), "state": "done", "images_seen": 1024, "images": 1024, "fd": 6.0},
        **{"fd_over_floor": 1.5, "recall": 0.9, "measured": "evaluation", "measured_at": 1024},
    }
    killed = by_name["group/killed"]
    assert (killed["fd"], killed["measured"], killed["measured_at"]) == (48.0, "training", 512)
    runs(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "images", "of", "x", "floor", "recall", "FD", "measured", "size", "age"]
    assert re.match(r"best +done +1,024 +1,024 +1\.5 +0\.9 +6 +evaluation +0\.0 MB +[12]:\d\d:\d\d$", lines[1])
    assert "training at 512" in next(line for line in lines if line.startswith("group/killed"))
    assert [run.state for run in find_runs(busy)[0]] == ["stopped"]


def test_damaged_runs_take_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "sound", 256, checkpoint=256)
    broken = {
        "empty": b"",
        "binary": b"\xff\x00\x01",
        "list": b"- 1",
        "pickle": b"!!python/object/apply:os.system ['true']",
        "zero": b"train: {images: 10, passes: 0}\nmatch: {round: 10}",
        "deep": b"[" * 1500,
        "bomb": b"a: &a {x: 1, y: 2}\n"
        + b"".join(b"%c: &%c {x: *%c, y: *%c}\n" % (n, n, n - 1, n - 1) for n in b"bcdefgh" * 1)
        + b"z: {"
        + b", ".join(b"k%d: *h" % n for n in range(2000))
        + b"}",
        "hollow": b"a: &a {}\n"
        + b"".join(
            b"%c: &%c {%s}\n" % (n, n, b", ".join(b"%d: *%c" % (k, n - 1) for k in range(9))) for n in b"bcdefghijkl"
        ),
        "long": b"train: {images: 0x%s, passes: 1}\nmatch: {round: 10}" % (b"f" * 5000),
        "large": b"train: {images: 1.0e+300, passes: 1}\nmatch: {round: 10}",
        "escape\033[2J": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_bytes(content)
    (tmp_path / "photos/deep").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / "photos/linked").symlink_to(tmp_path / "sound")
    runs(tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("photos/linked") and out[2].startswith("sound") and len(out) == 3 + len(broken)
    said = dict(line.removeprefix(f"{tmp_path}/").split(": ", 1) for line in out[3:])
    broken["escape?[2J"] = broken.pop("escape\033[2J")
    assert said.keys() == {*broken}
    with pytest.raises(InputError, match="no folder"):
        runs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="naign fetch"):
        runs(Path("s3://bucket/runs"))


def test_files_of_a_run_may_hold_anything(tmp_path: Path) -> None:
    folder, other = a_run(tmp_path / "run", 512, checkpoint=512, evaluated=2.0), a_run(tmp_path / "other", 256)
    hostile = (
        "[]",
        "{}",
        '{"fd": {"once": NaN}}',
        '{"fd": 5}',
        "\0",
        '{"fd": {"once": "x"}, "images_seen": -1}',
        "[" * 9999,
    )
    names = ("evaluation/metrics.json", "best.json", "checkpoints/step-00000016/trainer.json", "metrics.jsonl")
    for text, name in itertools.product(hostile, names):
        before = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_text(f"{text}\n" * (3 if name == "metrics.jsonl" else 1))
        found, others = find_runs(folder)
        if others:  # that file alone takes a line
            assert not found and others[str(folder)].startswith("its files are not those of a run")
            if text in ("[]", "\0"):
                assert f"{folder / name} holds no JSON object" in others[str(folder)]
            with pytest.raises(InputError, match="run' cannot be compared: "):
                read_sides([folder, other])
        else:
            assert found[0].fd in (8.0, 48.0)  # of the evaluation, or of the last measurement while training
            read_sides([folder, other])
        (folder / name).write_bytes(before)
    assert find_runs(folder)[0][0].fd == 8.0


def test_ages_and_counts_that_no_run_has_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "run", 256)
    (tmp_path / "run/metrics.jsonl").write_text('{"images_seen": true, "time": -1e200}\n')
    runs(tmp_path)
    assert re.match(r"run +unknown +1 +1,024 .* days, \d+:\d\d:\d\d$", capsys.readouterr().out.splitlines()[1])


def test_strange_names_and_values_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (a_run(tmp_path / name, 512, data__index=f"s3://me:p@{name}@host/x") for name in ("o\udcffne", "two"))
    compare((one, other))
    out = capsys.readouterr().out
    assert "o?ne" in out and "two" in out and "data.index" not in out and "://me" not in out


def test_what_was_not_evaluated_or_alike_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (a_run(tmp_path / name, 512, evaluated=1.5) for name in ("one", "other"))
    metrics = json.loads((one / "evaluation/metrics.json").read_text())
    (one / "evaluation/metrics.json").write_text(json.dumps({**metrics, "dataset": "x", "counts": {"test": 3}}))
    compare((one, other, a_run(tmp_path / "third", 512)))
    text = capsys.readouterr().out
    assert "not the same for all: data set, test examples; distances do not compare" in text
    assert text.count("was not evaluated") == 1
    assert f"third was not evaluated: run `naign evaluate {tmp_path}/third`" in text
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    with pytest.raises(InputError, match=r"exported model: .* after `naign evaluate .*/model`"):
        read_sides([one, tmp_path / "model"])
    shutil.copytree(one / "evaluation", tmp_path / "model/evaluation")
    (tmp_path / "model/config.json").write_text(json.dumps({"config": {"train": {"lr": 0.5}}}))
    sides = read_sides([one, tmp_path / "model"])
    assert sides[1].state == "model" and settings_that_differ(sides)["train.lr"] == ["0.002", "0.5"]


def test_runs_are_compared_as_a_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run(tmp_path / "one", 1024, checkpoint=1024, evaluated=1.5, train__lr=0.5)
    other = a_run(tmp_path / "other", 768, checkpoint=768, evaluated=2.5)
    folders = (one, other, a_run(tmp_path / "third", 512))
    compare(folders)
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert rows[:3] == [
        ["run", "one", "other", "third"],
        ["state", "done", "stopped", "unknown"],
        ["images seen", "1,024", "768", "512"],
    ]
    assert ["FD of f(z), × floor", "1.50*", "2.50", "–"] in rows and ["floor", "4.00", "4.00", "–"] in rows
    assert ["recall", "0.900*", "0.900*", "–"] in rows and not [row for row in rows if row[0] == "reconstruction"]
    assert rows[rows.index([""]) + 1 :][:2] == [
        ["setting", "one", "other", "third"],
        ["train.lr", "0.5", "0.002", "0.002"],
    ]
    compare(folders, json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["runs"][1] == {"label": "other", "path": str(other), "state": "stopped", "images_seen": 768}
    assert document["evaluation"]["fd.once_ratio"] == [1.5, 2.5, None] and document["unlike"] == []
    assert document["settings"] == {"train.lr": ["0.5", "0.002", "0.002"]}


def test_what_cannot_be_compared_is_named(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = a_run(tmp_path / "one", 512), a_run(tmp_path / "two", 512)
    (tmp_path / "photos").mkdir()
    cases: dict[str, list[Path | str]] = {
        "1 runs given": [one],
        "given twice": [one, two, tmp_path / "two/../one"],
        "photos' cannot be compared: no run in it": [one, tmp_path / "photos"],
        "`naign fetch` copies one": [one, "s3://bucket/run"],
        "nowhere' cannot be compared: No such file or directory": [one, tmp_path / "nowhere"],
    }
    for message, folders in cases.items():
        monkeypatch.setattr(sys, "argv", ["naign", "compare", *map(str, folders)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and message in err and not out and "Traceback" not in err


@pytest.mark.slow
def test_a_run_of_the_real_program(
    train: Program, tmp_path: Path, digits: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def naign(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["naign", *options])
        main()
        return capsys.readouterr().out

    options = [f"--data.path={digits}", "--quality.rounds=1", "--quality.samples=50", "--train.images=512", *SMALL]
    done = train("--run.path=runs/a", f"--run.remote={tmp_path}/bucket", *options)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(naign("runs", "runs", "--json"))["runs"]
    assert [run[key] for key in ("name", "state", "images_seen", "images")] == ["a", "done", 512, 512]
    assert run["measured"] == "training" and run["measured_at"] == 512 and run["fd"] > 0
    naign("fetch", f"{tmp_path}/bucket", "--to", "fetched")
    (copied,) = json.loads(naign("runs", "fetched", "--json"))["runs"]
    assert copied["state"] == "done" and [copied[key] for key in ("fd", "images")] == [run["fd"], 512]
    assert "not the same" not in naign("compare", "runs/a", "fetched")
    shutil.copytree(tmp_path / "runs/a", tmp_path / "runs/b")
    content = yaml.safe_load((tmp_path / "runs/b/config.yaml").read_text())
    content["train"]["lr"] = 0.5
    (tmp_path / "runs/b/config.yaml").write_text(yaml.safe_dump(content))
    assert re.search(r"^train\.lr +0\.002 +0\.5$", naign("compare", "runs/a", "runs/b"), re.MULTILINE)
