"""What commands print, their exit codes, and what a terminal shows meanwhile."""

import io
import os
import pty
import shlex
import sys
import tarfile
import termios
import threading
from dataclasses import replace

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
from tests.conftest import environment
from tests.data.numbered import add
from tests.programs import execute


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the program here, a line of words; it must end with this code. Returns its stdout and stderr."""

    def run(line, code=0):
        monkeypatch.setattr(sys, "argv", ["naign", *line.split()])
        capfd.readouterr()
        ended = 0
        try:
            main()
        except SystemExit as error:
            ended = error.code or 0
        out, err = capfd.readouterr()
        assert ended == code, err
        return out, err

    return run


@pytest.fixture
def images(tmp_path, save_untrained):
    """A model of images."""
    config = ConvConfig(width=4, code=8)
    return save_untrained(tmp_path / "images", data=None, shape=(1, 8, 8), config=config)


@pytest.fixture
def plane(tmp_path, save_untrained):
    """A model of points, of a data set with sixty in each split."""
    source = load("toy2d:gaussians")
    few = {}
    for name, split in source.splits.items():
        few[name] = Made(length=60, make=split.__getitem__)
    data = str(tmp_path / "data")
    pack(replace(source, splits=few), data, shards=1)
    return save_untrained(tmp_path / "model", data=data, shape=(2,), config=PointConfig(width=4))


def test_evaluate_prints_what_it_does(command, plane):
    out, err = command(f"evaluate {plane} --samples 50")
    assert f"report: {plane}/evaluation/report.html" in out
    for title in (*STAGES, "pictures and report"):
        assert f" s: {title}\n" in err


def test_verify_prints_what_is_known_and_what_is_wrong(command, tmp_path):
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG")
    shard = tmp_path / "train.tar"
    with tarfile.open(shard, "w") as tar:
        add(tar, "a.png", picture.getvalue())
        add(tar, "b.png", picture.getvalue()[:40])
    index(str(tmp_path), keep_broken=True)
    out, _ = command(f"verify {tmp_path}")
    assert "sound, 2 samples" in out
    assert "of them 1 are known to be broken, as train.tar b" in out
    with shard.open("r+b") as file:
        file.seek(512)
        file.write(b"\xff")
    _, err = command(f"verify {tmp_path}", code=2)
    assert "train.tar: the SHA-256 of what follows byte 0" in err


def test_doctor_prints_findings(command, monkeypatch):
    out, _ = command("doctor")
    assert "disk here: " in out
    assert out.endswith("ready\n")
    monkeypatch.setattr(host, "faiss_builds", lambda: ["faiss-cpu 1.15.1", "faiss-gpu 1.12.0"])
    _, err = command("doctor", code=2)
    assert "this machine is not ready" in err


def test_the_version_and_what_train_takes_beside_settings(command):
    assert command("--version") == (f"naign {find_version()}\n", "")
    out, _ = command("train --help")
    for option in ("--config FILE", "--engine FILE", "--processes N", "--seed"):
        assert option in out


def test_a_completion_script_holds_all_commands(command):
    script, _ = command("--tyro-print-completion fish")
    assert "--samples" in script
    for name in COMMANDS:
        assert f"'{name}': {{" in script


def on_terminal(call, monkeypatch):
    """What a call writes to stderr where that is a terminal."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    said = []

    def read():
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


def test_commands_that_take_long_show_what_they_do(tmp_path, images, capsys, monkeypatch):
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")

    def sample():
        cli.sample(images, n=3, to=tmp_path / "out")

    def restore():
        cli.restore(images, (tmp_path / "a.png",), to=tmp_path / "out", size="picture")

    def score():
        cli.score(images, (tmp_path / "a.png",))

    shown = {
        sample: ["sampling", "writing"],
        restore: ["reading:", "restoring"],
        score: ["reading:", "scoring"],
    }
    for call, words in shown.items():
        monkeypatch.setattr(terminal, "DELAY", 0.0)
        said = on_terminal(call, monkeypatch)
        for word in words:
            assert word in said
        call()
        assert capsys.readouterr().err.strip() in ("", cli.NO_BANK)  # no terminal, no progress


def test_long_work_is_a_line_every_few_seconds_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    monkeypatch.setattr(terminal, "LOG_EVERY", 0.0)
    assert list(terminal.counted("verify train", range(4), unit="sample")) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("verify train:  25% 1/4 [")


def test_a_call_without_steps_shows_what_it_does(monkeypatch):
    def wait():
        with terminal.busy("exporting"):
            pass

    assert "exporting ..." in on_terminal(wait, monkeypatch)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("score mnist a.png > /dev/full", 1),
        ("score mnist a.png >&- 2>&-", 0),
        ("launch --help >&-", 0),
    ],
)
def test_output_that_cannot_be_written_ends_in_a_sentence(words, code, tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    program = f"{shlex.quote(sys.executable)} -m naign.cli {words}"
    done = execute(["bash", "-c", program], tmp_path, env=environment())
    assert done.returncode == code
    assert done.stderr.removeprefix(cli.NO_BANK + "\n") == "naign: failed: the output: No space left on device\n" * code
