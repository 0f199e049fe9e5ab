"""What programs read of the commands: JSON on stdout, exit codes; and what a terminal shows meanwhile."""

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tarfile
import termios
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from naign import terminal
from naign.cli import model as cli
from naign.cli.main import COMMANDS, find_version, main
from naign.data.format.indexing import index
from naign.data.format.writer import pack
from naign.data.sources.catalog import load
from naign.data.sources.source import Made
from naign.distributed import host
from naign.evaluate.measures import STAGES
from naign.model.networks import ConvConfig, PointConfig
from naign.observe import doctor
from tests.conftest import ROOT
from tests.data.numbered import add

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the program here; its exit code and all that it wrote to stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["naign", *arguments])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def plane(tmp_path: Path, save_untrained: Callable[..., str]) -> str:
    """A model of points, of a data set with sixty in each split."""
    source = load("toy2d:gaussians")
    few = {name: Made(length=60, make=split.__getitem__) for name, split in source.splits.items()}
    pack(replace(source, splits=few), str(tmp_path / "data"), shards=1, progress=False)
    return save_untrained(tmp_path / "model", data=str(tmp_path / "data"), shape=(2,), config=PointConfig(width=4))


def test_evaluate_prints_what_it_writes(command: Command, plane: str) -> None:
    code, out, err = command("evaluate", plane, "--samples", "50", "--json")
    found = json.loads(out)
    assert code == 0 and found.pop("report") == f"{plane}/evaluation/report.html"
    assert found == json.loads(Path(plane, "evaluation/metrics.json").read_text())
    assert all(f" s: {title}\n" in err for title in (*STAGES, "pictures and report"))
    assert command("evaluate", f"{plane}/none", "--json")[:2] == (2, "")


def test_score_prints_files_and_lines(
    command: Command, plane: str, tmp_path: Path, save_untrained: Callable[..., str]
) -> None:
    (tmp_path / "points.csv").write_text("1,2\n3,4\n")
    code, out, _ = command("score", plane, str(tmp_path / "points.csv"), "--json", "--times", "2")
    found = json.loads(out)
    assert code == 0 and (found["run"], found["times"]) == (plane, 2)
    table = command("score", plane, str(tmp_path / "points.csv"), "--times", "2")[1].splitlines()[1:]
    assert [f"{row['file']}:{row['line']},{row['energy']:.6g}" for row in found["energies"]] == table
    images = save_untrained(tmp_path / "images", data=None, shape=(1, 8, 8), config=ConvConfig(width=4, code=8))
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    (row,) = json.loads(command("score", images, str(tmp_path / "a.png"), "--json")[1])["energies"]
    assert row["file"] == str(tmp_path / "a.png") and row["line"] is None and row["energy"] > 0
    (tmp_path / "b.png").write_bytes(b"no picture")
    code, out, err = command("score", images, str(tmp_path / "b.png"), "--json")
    assert (code, out) == (2, "") and "b.png: not a picture" in err


def test_verify_prints_what_is_known_and_what_is_wrong(command: Command, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "a.png", picture.getvalue())
        add(tar, "b.png", picture.getvalue()[:40])
    index(str(tmp_path), keep_broken=True, progress=False)
    code, out, _ = command("verify", str(tmp_path), "--json")
    size = (tmp_path / "train.tar").stat().st_size
    expected = {"path": str(tmp_path), "sound": True, "problems": [], "samples": 2, "shards": 1, "bytes": size}
    assert code == 0 and json.loads(out) == expected | {"broken": [{"shard": "train.tar", "key": "b"}]}
    assert "of them 1 are known to be broken: train.tar b" in command("verify", str(tmp_path))[1]
    with (tmp_path / "train.tar").open("r+b") as file:
        file.seek(512)
        file.write(b"\xff")
    code, out, err = command("verify", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 2 and "naign: error: " in err and found.keys() == {*expected, "broken"}
    assert found["sound"] is False and re.search("key a: the .png cannot be decoded", found["problems"][0])
    assert command("verify", str(tmp_path / "none"), "--json")[:2] == (2, "")


def test_doctor_prints_findings(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.faiss, doctor.disk))  # others take seconds
    code, out, _ = command("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == {"ready", "findings"} and found["ready"] is True
    assert [one["check"] for one in found["findings"]] == ["faiss", "disk"]
    assert all(one.keys() == {"check", "text", "remedy"} for one in found["findings"])
    monkeypatch.setattr(host, "faiss_builds", lambda: ["faiss-cpu 1.15.1", "faiss-gpu-cu12 1.12.0"])
    code, out, err = command("doctor", "--json")
    assert code == 2 and json.loads(out)["ready"] is False and "this machine is not ready" in err


def test_the_version_and_what_train_takes_beside_settings(command: Command) -> None:
    assert command("--version") == (0, f"naign {find_version()}\n", "")
    code, out, _ = command("train", "--help")
    assert code == 0 and all(option in out for option in ("--config FILE", "--engine FILE", "--processes N", "--seed"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_hold_all_commands(shell: str, command: Command) -> None:
    code, script, _ = command("--tyro-print-completion", shell)
    assert code == 0 and all(f"'{name}': {{" in script for name in COMMANDS) and "--samples" in script


def on_terminal(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a call writes to stderr where that is a terminal."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    said = []

    def read() -> None:
        while True:
            try:
                said.append(os.read(outer, 4096))
            except OSError:  # closed at the other end
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        call()
        monkeypatch.undo()
    reader.join()
    os.close(outer)
    return b"".join(said).decode()


def test_commands_that_take_long_show_what_they_do(
    tmp_path: Path, save_untrained: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    model = save_untrained(tmp_path / "model", data=None, shape=(1, 8, 8), config=ConvConfig(width=4, code=8))
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    file = (tmp_path / "a.png",)
    calls: dict[Callable[[], Any], list[str]] = {
        lambda: cli.sample(model, n=3, to=tmp_path / "out"): ["sampling", "writing"],
        lambda: cli.restore(model, file, to=tmp_path / "out"): ["reading:", "restoring"],
        lambda: cli.score(model, file): ["reading:", "scoring"],
    }
    for call, words in calls.items():
        monkeypatch.setattr(terminal, "DELAY", 0.0)
        said = on_terminal(call, monkeypatch)
        assert all(word in said for word in words), said
        call()
        assert capsys.readouterr().err == ""  # no terminal, no progress


def test_a_call_without_steps_shows_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = threading.Event()

    class Watched(terminal.tqdm):  # type: ignore[type-arg]
        def refresh(self, *given: Any, **named: Any) -> None:
            super().refresh(*given, **named)
            shown.set()

    def wait() -> None:
        with terminal.busy("exporting"):
            assert shown.wait(30)

    monkeypatch.setattr(terminal, "DELAY", 0.0)
    monkeypatch.setattr(terminal, "tqdm", Watched)
    assert "exporting 00:0" in on_terminal(wait, monkeypatch)


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 1), (">&-", 0), (">&- 2>&-", 0)])
def test_output_that_cannot_be_written_ends_in_a_sentence(redirection: str, code: int, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    program = f"{shlex.quote(sys.executable)} -c 'from naign.cli.main import main; main()' score mnist"
    command = f"{program} {shlex.quote(str(tmp_path / 'a.png'))} {redirection}"
    refused_in_a_line(command, code)


@pytest.mark.parametrize("words", ["--version", "train --help", "launch --help"])
@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 1), (">&-", 0)])
def test_a_version_or_help_that_cannot_be_written_ends_in_a_sentence(redirection: str, code: int, words: str) -> None:
    refused_in_a_line(f"{shlex.quote(sys.executable)} -m naign.cli {words} {redirection}", code)


def refused_in_a_line(command: str, code: int) -> None:
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "naign: failed: the output: No space left on device\n" * code)
