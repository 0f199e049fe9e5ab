"""`naign launch` itself: what signals do to it, and to its ranks."""

import asyncio
import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from naign.cluster import launch
from naign.cluster.place import Place
from naign.cluster.rejoin import Hosts
from naign.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST
from naign.process import SIGNALS, on_signals
from tests.conftest import PYTHONPATH, ROOT, SMALL, environment
from tests.e2e.runs import newest, rounds_of, wait_for_rounds
from tests.hosts.cluster import possible
from tests.hosts.waiting import until
from tests.programs import ends, execute, succeeded
from tests.servers import free_port


@pytest.fixture
def start(tmp_path):
    """Start it in an empty folder; none is left behind."""
    started = []

    def run(*options, program=("-m", "naign.cli"), **more):
        process = subprocess.Popen(
            [sys.executable, *program, "launch", *options],
            cwd=tmp_path,
            env=environment(**more),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def hangups():
    """SIGHUP is not ignored, whatever has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    on_signals(lambda *_: None)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and callable(signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize(
    ("option", "errors"),
    [
        ("--port=0", "argument --port: 0: it must lie between 1 and 65535"),
        ("--wait=nan", "argument --wait: nan: it must lie between 1 and"),
        ("--metrics=soon", "argument --metrics: invalid number value: 'soon'"),
    ],
)
def test_an_option_out_of_bounds_is_refused(option, errors, handlers, capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main([option])
    assert caught.value.code == BAD_INPUT and errors in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "launch"])
def test_messages_begin_with_the_command_as_typed(command, handlers, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["naign", command])
    assert launch.main(["--engine=zero9"]) == BAD_INPUT
    assert capsys.readouterr().err.startswith(f"naign {command}: error: ")


@pytest.fixture
def unanswered(monkeypatch):
    """A bucket out of reach."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(launch, "REACH", 0.0)


def test_a_bucket_out_of_reach_ends_a_start_with_a_code_that_restarts(unanswered, handlers, capsys):
    assert launch.main(["--run.remote=s3://bucket/run"]) == FAILED
    last = capsys.readouterr().err.splitlines()[-1]
    assert "run.remote cannot be reached" in last and "http://127.0.0.1:9" in last


def test_a_pod_that_is_replaced_after_the_run_was_done_ends(
    train,
    small,
    handlers,
    capsys,
    monkeypatch,
    tmp_path,
):
    """Host 0 completed and never comes again: its folder, which all hosts share, tells."""
    options = [*small, "--train.images=512", f"--run.path={tmp_path}/run"]
    succeeded(train(*options))
    for name, value in {"NAIGN_HOSTS": "2", "NAIGN_HEAD": "localhost", "JOB_COMPLETION_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.main(["--wait=1", *options]) == 0
    assert f"nothing left to do: the run in {tmp_path}/run is done" in capsys.readouterr().err
    assert launch.main(["--wait=1", *options, "--train.images=1024", "--resume=changed"]) == PEER_LOST
    assert "NAIGN_LAUNCHER" not in os.environ  # it would end what this process starts later


def training(start, folder, *options):
    """A long run in `folder` that has trained for some rounds."""
    job = start(*options, *SMALL, "--train.images=307200", "--run.path=run")
    wait_for_rounds(job, folder / "run", 6)
    assert job.poll() is None, job.communicate()[1]
    return job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "first"),
    [
        (("--processes=2",), "SIGTERM"),
        (("--processes=1", "--engine=single"), "SIGINT"),  # Ctrl-C: a terminal sends it to all processes
    ],
)
def test_further_signals_change_nothing(ranks, first, start, digits, tmp_path):
    """Neither while the ranks write their checkpoint, nor when the code is known. Before that /metrics has values."""
    port = free_port()
    job = training(start, tmp_path, *ranks, f"--metrics={port}", f"--data.path={digits}")
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
        assert b"\nnaign_round " in answer.read()
    if first == "SIGINT":
        os.killpg(job.pid, signal.SIGINT)
    deadline = time.monotonic() + 60
    while job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
    ends(job, INTERRUPTED, f"{first}: stopped on request")
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_terminal_that_is_closed_leaves_a_checkpoint(small, tmp_path):
    """All processes get SIGHUP, and what they write to it fails from then on."""
    options = [*small, "--train.images=307200", f"--run.path={tmp_path}/run"]
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        command = [sys.executable, "-m", "naign.cli", "launch", "--processes=2"]
        os.execve(sys.executable, [*command, *options], environment())
    os.set_blocking(terminal, False)

    def trains():
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # else it is full, and the program waits
        return rounds_of(tmp_path / "run") > 5

    until(trains)
    os.close(terminal)
    assert psutil.Process(process).wait(60) == INTERRUPTED
    assert newest(tmp_path / "run").name != "step-00000000"


@pytest.mark.slow
def test_one_rank_under_an_engine_keeps_its_code(start):
    job = start("--processes=1", "--engine=single", "--data.path=nowhere", "--run.path=run")
    errors = ends(job, BAD_INPUT)
    assert "rank 0 of this host ended with code 2, bad configuration" in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_host_that_is_lost_at_once_is_waited_for_and_signals_are_heeded(start, digits):
    port = free_port()
    named = {"NAIGN_HOSTS": "2", "NAIGN_HEAD": "localhost", "JOB_COMPLETION_INDEX": "0", "NAIGN_START": "s"}
    job = start(f"--port={port}", f"--data.path={digits}", "--run.path=run", **named)
    place = Place(
        orchestrator="Kubernetes",
        index=1,
        hosts=2,
        head="localhost",
        start="s",
    )

    async def run():
        for generation in (1, 2):
            links = await Hosts(place, port=port, ranks=1, within=60).meet()
            assert links.generation == generation and job.poll() is None
            links.close()  # as if the host were gone
        await asyncio.sleep(1)

    asyncio.run(run())
    job.terminate()
    errors = ends(job, INTERRUPTED, "this host stays", timeout=30)
    assert "stopped on request" in errors.splitlines()[-1]


HELD = """
import os, pathlib, sys, time

class Hold:
    def find_spec(self, name, path=None, target=None):
        if name == "naign.config":  # imported first
            rank = os.environ["LOCAL_RANK"]
            pathlib.Path(os.environ["HELD"], rank + ".new").write_text(str(os.getpid()))
            pathlib.Path(os.environ["HELD"], rank + ".new").rename(pathlib.Path(os.environ["HELD"], rank))
            time.sleep(600 if rank == "1" else 0)

if "LOCAL_RANK" in os.environ:
    sys.meta_path.insert(0, Hold())
"""
"""sitecustomize.py: rank 1 stays in its imports, so that rank 0 waits to connect; each leaves its process id."""


def is_over(process):
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_is_killed_while_they_import_and_connect(start, small, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HELD)
    job = start(
        *("--processes=2", *small, "--run.path=run"),
        PYTHONPATH=f"{tmp_path}{os.pathsep}{PYTHONPATH}",
        HELD=str(tmp_path),
    )
    until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    ranks = [psutil.Process(int((tmp_path / name).read_text())) for name in ("0", "1")]
    try:  # rank 0 waits for the others once it has opened its store
        until(lambda: any(one.status == psutil.CONN_LISTEN for one in ranks[0].net_connections()))
        assert not any(map(is_over, ranks))
        job.kill()
        until(lambda: all(map(is_over, ranks)), seconds=60)
    finally:
        for rank in ranks:
            if not is_over(rank):
                rank.kill()


def test_a_rank_whose_launcher_is_gone_already_ends_at_once():
    program = [sys.executable, str(ROOT / "pipeline/train.py")]
    named = environment(NAIGN_LAUNCHER="1", ACCELERATE_MIXED_PRECISION="no")
    done = execute(program, env=named, timeout=60)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "")


PROGRAMS = {
    "training": (sys.executable, str(ROOT / "pipeline/train.py")),
    "launcher": (sys.executable, "-m", "naign.cli", "launch", "--processes=2"),
    "entrypoint": ("sh", str(ROOT / "launch/entrypoint"), "--processes=2"),
}


@contextlib.contextmanager
def contained(folder, *command):
    """A program and its first process, as of a container where namespaces can be made."""
    unshared = not possible()
    if unshared:
        command = ("unshare", "--fork", "--pid", "--kill-child", *command)
    env = environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first = outer = psutil.Process(process.pid)
        if unshared:
            until(lambda: bool(outer.children()))
            (first,) = outer.children()
        yield process, first
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_signal_in_the_first_seconds_ends_the_program_at_once(name, digits, tmp_path):
    """The first process of a container ignores signals without handlers."""
    options = (*SMALL, f"--data.path={digits}", "--run.path=run", "--train.images=307200")
    with contained(tmp_path, *PROGRAMS[name], *options) as (process, first):
        status = Path(f"/proc/{first.pid}/status")
        until(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << signal.SIGTERM - 1)
        assert "libtorch" not in Path(f"/proc/{first.pid}/maps").read_text()
        first.terminate()
        errors = ends(process, INTERRUPTED, timeout=20)
    assert not list(tmp_path.rglob(".partial-*"))
    assert name == "training" or "stopped on request" in errors


def test_a_signal_ends_a_pack_that_is_the_first_process_of_a_container(tmp_path):
    words = ["-m", "naign.cli", "pack", "toy2d:gaussians", "--to", "packed", "--shards", "1"]
    with contained(tmp_path, sys.executable, *words) as (process, first):
        until(lambda: bool(list(tmp_path.rglob(".partial-*"))))
        first.terminate()
        ends(process, 128 + signal.SIGTERM, timeout=20)
    assert not list(tmp_path.rglob(".partial-*"))
