"""Where a host stands, how hosts meet in any order, and what a host ends with."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from naign.cluster.exit_codes import Ending, explain
from naign.cluster.local_ranks import find_engine, without_engine
from naign.cluster.meeting import Links, listen, meet, reject_all
from naign.cluster.place import PORTS, Place, find_place, find_ports
from naign.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST, InputError, PeerLost
from tests.servers import free_port


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Place(orchestrator="none")),
        (
            {"NAIGN_HOSTS": "4", "JOB_COMPLETION_INDEX": "3", "NAIGN_HEAD": "a-0.a", "NAIGN_START": "uid"},
            Place(orchestrator="Kubernetes", index=3, hosts=4, head="a-0.a", start="uid"),
        ),
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head", "PET_NPROC_PER_NODE": "8"},
            Place(orchestrator="Kubeflow", index=1, hosts=2, head="head", processes=8),
        ),
        (
            {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"},
            Place(orchestrator="Kubeflow"),
        ),
        (
            {
                **{"SLURM_PROCID": "1", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
                **{"SLURM_RESTART_COUNT": "3", "SLURM_STEP_ID": "1", "NAIGN_HEAD": "node3"},
            },
            Place(orchestrator="Slurm", index=1, hosts=2, head="node3", start="7.3.1"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}, Place(orchestrator="none")),  # no srun
    ],
)
def test_the_place_is_what_the_orchestrator_says(environ, expected):
    assert find_place(environ) == expected


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"NAIGN_HOSTS": "2", "JOB_COMPLETION_INDEX": "0"}, "NAIGN_HEAD is not set"),
        ({"NAIGN_HOSTS": "2", "NAIGN_HEAD": "a"}, "JOB_COMPLETION_INDEX is not set"),
        ({"NAIGN_HOSTS": "two", "NAIGN_HEAD": "a", "JOB_COMPLETION_INDEX": "0"}, "NAIGN_HOSTS is 'two'"),
        ({"NAIGN_HOSTS": "2", "NAIGN_HEAD": "a", "JOB_COMPLETION_INDEX": "2"}, "host 2 of 2, counted from 0"),
        (
            {"SLURM_PROCID": "1", "SLURM_NNODES": "2", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"},
            "one a node is wanted",
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"},
            "this job has 2 nodes: start training with srun",
        ),
        ({"NAIGN_HOSTS": "9" * 5000, "NAIGN_HEAD": "a", "JOB_COMPLETION_INDEX": "0"}, "from 0 to 99999"),
        ({"NAIGN_HOSTS": "2", "NAIGN_HEAD": "a..b", "JOB_COMPLETION_INDEX": "1"}, "'a..b' is no name of a host"),
        ({"JOB_COMPLETION_INDEX": "1"}, "NAIGN_HOSTS is not set"),
        ({"PET_NNODES": "2"}, "PET_NODE_RANK is not set"),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "9" * 5000}, "from 0 to 99999"),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1025"}, "1025 ranks on this host: at most 1024"),
        ({"PET_NNODES": "1", "NAIGN_GENERATION": "1", "NAIGN_SINCE": "3"}, "set neither"),
        ({"NAIGN_HOSTS": "2", "NAIGN_HEAD": "ß" * 63, "JOB_COMPLETION_INDEX": "1"}, "is no name of a host"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(environ, said):
    with pytest.raises(InputError, match=said):
        find_place(environ)


def test_jobs_that_share_a_node_have_ports_of_their_own():
    assert find_ports({}) == PORTS
    found = [find_ports({"SLURM_JOB_ID": str(job)}) for job in range(123_456, 123_456 + 6000)]
    ports = {port for pair in found for port in pair}
    assert find_ports({"SLURM_JOB_ID": "7" * 5000}) != PORTS
    assert len(ports) == 12_000 and min(ports) >= 1024 and max(ports) < 32_768


def place(index: int, hosts: int, start: str = "a") -> Place:
    return Place(orchestrator="test", index=index, hosts=hosts, head="localhost", start=start)


class Meeting:
    """Hosts in threads."""

    def __init__(self, hosts: int) -> None:
        self.hosts, self.port = hosts, free_port()
        self.found: dict[int, Any] = {}
        self.threads: list[threading.Thread] = []

    def come(self, index: int, *, start: str = "a", hosts: int | None = None, within: float = 20) -> None:
        def run() -> None:
            mine = place(index, hosts or self.hosts, start)
            with contextlib.nullcontext() if index else listen(self.port) as listener:
                try:
                    self.found[index] = meet(mine, listener, port=self.port, within=within)
                except (InputError, PeerLost) as error:
                    self.found[index] = error
                    if listener and isinstance(error, InputError):  # as `naign launch` does
                        reject_all(listener, mine, error)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def end(self) -> None:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_hosts_meet_in_any_order(order):
    meeting = Meeting(4)
    for index in order:
        meeting.come(index)
        time.sleep(0.1)
    meeting.end()
    assert [meeting.found[index].address in ("127.0.0.1", "::1") for index in range(4)] == [True] * 4


@pytest.mark.slow
def test_a_host_that_comes_again_replaces_itself():
    meeting = Meeting(3)
    meeting.come(0)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # a pod that was replaced before all were there
        try:
            gone = socket.create_connection(("localhost", meeting.port))
            break
        except OSError:
            time.sleep(0.05)
    gone.sendall(hello(hosts=3))
    time.sleep(0.3)
    gone.close()
    meeting.come(2)
    time.sleep(0.5)
    assert 0 not in meeting.found
    meeting.come(1)
    meeting.end()
    assert all(isinstance(found, Links) for found in meeting.found.values())


@pytest.mark.slow
def test_strangers_and_other_starts_are_turned_away(capsys):
    meeting = Meeting(2)
    meeting.come(0)
    meeting.come(1, start="an earlier one", within=1)
    time.sleep(0.5)
    with socket.create_connection(("localhost", meeting.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"no host of this job" in stranger.recv(1000)
    meeting.threads[1].join(10)
    assert isinstance(meeting.found[1], PeerLost)
    meeting.come(1)
    meeting.end()
    assert isinstance(meeting.found[1], Links)
    assert "another start of this job (an earlier one)" in capsys.readouterr().err


def hello(**said: Any) -> bytes:
    told = {"start": "a", "index": 1, "hosts": 2, "generation": 0, "member": "m"}
    return json.dumps(told | said).encode() + b"\n"


@pytest.mark.parametrize(
    "words",
    [
        b"[" * 4000 + b"\n",
        b"\xff\xfe\n",
        hello(index=-7),
        hello(index=0),
        hello(index=float("inf")),
        hello(generation=10**9),
        hello(since=2),
        hello(start="b\n: done\x1b[2J"),
        b"x" * 10_000,
    ],
    ids=["nested", "bytes", "negative", "zero", "infinite", "far", "ahead", "escapes", "long"],
)
def test_nothing_that_a_stranger_says_ends_a_meeting(words, capsys):
    meeting = Meeting(2)
    meeting.come(0)
    time.sleep(0.3)
    with socket.create_connection(("localhost", meeting.port)) as stranger:
        stranger.sendall(words)
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionError):
            while stranger.recv(4096):
                pass
    meeting.come(1)
    meeting.end()
    assert all(isinstance(found, Links) for found in meeting.found.values())
    assert all(line.isprintable() for line in capsys.readouterr().err.split("\n"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "another program answers there"),
        (b"[" * 100_000 + b"\n", "another program answers there"),
        (b"\xff\n", "another program answers there"),
        (b'{"end": true}\n', "rejected this one"),
        (b"x", "waited 1 s for"),
    ],
    ids=["http", "nested", "bytes", "no reason", "drips"],
)
def test_nothing_that_another_program_answers_holds_a_host(answer, said):
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                talking.append(server.accept()[0])
                with contextlib.suppress(OSError):
                    while len(answer) == 1:
                        talking[-1].sendall(answer)
                        time.sleep(0.3)
                    talking[-1].sendall(answer)

    talking: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises((InputError, PeerLost), match=said):
            meet(place(1, 2), None, port=server.getsockname()[1], within=1)
        for connection in talking:
            connection.close()


def test_hosts_that_count_differently_all_end():
    meeting = Meeting(3)
    meeting.come(0)
    meeting.come(2)
    time.sleep(1)
    meeting.come(1, hosts=4)
    meeting.end()
    for found in meeting.found.values():
        assert isinstance(found, InputError) and "host 1 counts 4 hosts, host 0 counts 3" in str(found)


@pytest.mark.slow
def test_who_comes_to_a_first_host_that_ends_learns_why():
    port = free_port()
    listener = listen(port)
    found: list[str] = []

    def come(index: int) -> None:
        with pytest.raises(InputError) as caught:
            meet(place(index, 3), None, port=port, within=20)
        found.append(str(caught.value))

    early = threading.Thread(target=come, args=(1,))
    early.start()  # before host 0 knows that something is wrong
    with listener, socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        time.sleep(0.5)
        late = threading.Timer(1, come, args=(2,))
        late.start()
        begun = time.monotonic()
        reject_all(listener, place(0, 3), InputError("no GPUs"), within=20)
        assert time.monotonic() - begun < 10
        assert b'"end": false' in stranger.recv(1000)
    early.join(10)
    late.join(10)
    assert found == ["host 0: no GPUs"] * 2
    with listen(port) as listener:
        reject_all(listener, place(0, 3), InputError("no GPUs"), within=0.2)


def test_a_stranger_who_is_silent_is_not_taken_for_the_first_host():
    with socket.create_server(("127.0.0.1", 0)) as stranger, pytest.raises(PeerLost, match="where a program listens"):
        meet(place(1, 2), None, port=stranger.getsockname()[1], within=1)


def test_a_taken_port_is_told():
    with socket.create_server(("", 0)) as taken, pytest.raises(InputError, match="choose another --meeting-port"):
        listen(taken.getsockname()[1])


def test_who_waits_for_nobody_gives_up():
    with listen(free_port()) as listener, pytest.raises(PeerLost, match="waited 0 s for host 1 of 2"):
        meet(place(0, 2), listener, port=0, within=0.1)
    with pytest.raises(PeerLost, match="host 0"):
        meet(place(1, 2), None, port=free_port(), within=0.1)


def test_the_end_of_a_host_is_told_to_the_others():
    meeting = Meeting(3)
    for index in range(3):
        meeting.come(index)
    meeting.end()
    told: list[tuple[int, int | None, bool]] = []
    meeting.found[0].watch(lambda *words: told.append(words))
    meeting.found[1].leave(76, lost=True)
    for peer in meeting.found[2]._peers.values():
        peer.close()  # as the system does for a process that is killed
    deadline = time.monotonic() + 5
    while len(told) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(told, key=str) == [(1, 76, True), (2, None, False)]


def test_what_host_0_says_is_not_lost():
    meeting = Meeting(2)
    for index in range(2):
        meeting.come(index)
    meeting.end()
    meeting.found[0].leave(2)
    told: list[tuple[int, int | None, bool]] = []
    meeting.found[1].watch(lambda *words: told.append(words))
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == [(0, 2, False)]


def failure(code: int, message: str = "", rank: int = 0, at: int = 0) -> Any:
    return SimpleNamespace(exitcode=code, local_rank=rank, message=message, timestamp=at)


def test_a_host_ends_with_the_code_that_says_most():
    code, said, killed = explain({0: failure(76), 1: failure(2, "train: error: no such thing", 1), 2: failure(1)})
    assert code == BAD_INPUT and not killed and said.endswith("not tried again: train: error: no such thing")
    assert explain({0: failure(76), 1: failure(1)})[0] == FAILED
    assert explain({0: failure(75), 1: failure(76)})[0] == PEER_LOST
    assert explain({0: failure(75)})[0] == INTERRUPTED
    code, said, killed = explain({0: failure(-9)})
    assert code == FAILED and killed and "SIGKILL: out of memory?" in said
    assert not explain({0: failure(-6)})[2]  # as NCCL ends a rank whose peer is gone
    assert explain({0: failure(76, at=1), 1: failure(-9, at=2)})[0] == FAILED  # its end made the other one end
    assert explain({0: failure(76, at=1), 1: failure(-9, at=36)})[0] == PEER_LOST  # it hung, and the launcher killed it


@pytest.mark.parametrize(
    ("word", "expected"),
    [((76, False), FAILED), ((1, False), FAILED), ((76, True), PEER_LOST), ((None, False), PEER_LOST)],
)
def test_a_crash_counts_unless_a_host_vanished(word, expected, monkeypatch):
    monkeypatch.setattr("naign.cluster.exit_codes.SOON", 0.5)
    assert Ending(patience=0.0, alone=True).judge(1) == FAILED
    ending = Ending(patience=60)
    thread = threading.Thread(target=ending.note, args=(1, *word))
    threading.Timer(0.5, thread.start).start()  # its word comes after this host's ranks have ended
    assert ending.judge(1) == expected and ending.judge(BAD_INPUT) == BAD_INPUT and ending.judge(0) == 0
    thread.join(5)


@pytest.mark.parametrize(("code", "told"), [(BAD_INPUT, False), (1, True)])
def test_what_is_wrong_with_the_input_is_the_last_line(code, told, capsys):
    """The connection's thread tells of another host, which ends for the same reason, at any moment."""
    ending = Ending(patience=60)
    ending.report(code, "train.images is -1")
    thread = threading.Thread(target=ending.note, args=(0, BAD_INPUT, False))
    thread.start()
    ending.wait_for(lambda: 0 in ending.codes, 5)
    assert ending.codes[0] == BAD_INPUT
    assert ending.judge(code) == code
    thread.join(5)
    lines = capsys.readouterr().err.splitlines()
    assert "train.images is -1" in lines[0] and len(lines) == 1 + told


def test_ranks_that_do_not_end_when_a_host_was_lost_are_killed(monkeypatch):
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    tree = SimpleNamespace(children=lambda recursive: [psutil.Process(rank.pid)])  # not what other tests have started
    known = SimpleNamespace(Process=lambda: tree, NoSuchProcess=psutil.NoSuchProcess)
    monkeypatch.setattr("naign.cluster.exit_codes.psutil", known)
    ending = Ending(patience=0.0)
    thread = threading.Thread(target=ending.note, args=(1, 1, False))
    thread.start()
    assert rank.wait(30) == -signal.SIGKILL
    assert ending.judge(1) == PEER_LOST and ending.judge(BAD_INPUT) == BAD_INPUT and ending.judge(0) == 0
    thread.join(5)


@pytest.mark.parametrize(
    ("gpus", "precision", "mixed"), [(2, "", "bf16"), (2, "fp32", "no"), (2, "auto", "no"), (0, "", "no")]
)
def test_the_precision_of_ddp_is_that_of_the_training(gpus, precision, mixed, monkeypatch):
    """What a configuration says contradicts another train.precision, and no user wrote this one."""
    monkeypatch.setattr("naign.distributed.host.count_gpus", lambda: gpus)
    assert yaml.safe_load(find_engine("", precision))["mixed_precision"] == mixed
    assert without_engine(precision) == ("false" if gpus else "true", mixed)


def test_engines_are_found_by_name_and_by_file(tmp_path):
    assert yaml.safe_load(find_engine("", ranks=1))["distributed_type"] == "NO"
    assert "zero_stage: 2" in find_engine("zero2")
    text = find_engine("cpu")
    (tmp_path / "mine.yaml").write_text(text)
    assert find_engine(str(tmp_path / "mine.yaml")) == text
    malformed = ("", "- a\n", "mine: true\n", text.replace("MULTI_GPU", "MANY"), "a: [")
    of_others = (
        text.replace("MULTI_GPU", "MEGATRON_LM"),
        text.replace("MULTI_GPU", "XLA"),
        f"{text}mixed_precision: 7\n",
    )
    (tmp_path / "mine.yaml").write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: NO, mixed_precision: no}"
    )
    assert "NO" in find_engine(str(tmp_path / "mine.yaml"))
    for wrong in (*malformed, *of_others):
        (tmp_path / "mine.yaml").write_text(wrong)
        with pytest.raises(InputError, match="is no configuration of Accelerate"):
            find_engine(str(tmp_path / "mine.yaml"))
    deepspeed = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "mixed_precision": "no"}
    for settings, said in (
        ({"zero_stage": 9}, "zero_stage is 9"),
        ({"deepspeed_config_file": "/no.json"}, "no such file"),
    ):
        (tmp_path / "mine.json").write_text(json.dumps(deepspeed | {"deepspeed_config": settings}, indent="\t"))
        with pytest.raises(InputError, match=said):
            find_engine(str(tmp_path / "mine.json"))
    accepted = {"zero_stage": "2", "deepspeed_config_file": "none"}
    (tmp_path / "mine.json").write_text(json.dumps(deepspeed | {"deepspeed_config": accepted}, indent="\t"))
    assert yaml.safe_load(find_engine(str(tmp_path / "mine.json")))["deepspeed_config"] == accepted
    assert "MULTI_GPU" in find_engine("") and "'NO'" not in find_engine("")
    with pytest.raises(InputError, match="no name in launch/: cpu, fsdp, gpus"):
        find_engine("zero9")
    with pytest.raises(InputError, match="is no file"):
        find_engine("x" * 5000)


def test_the_interface_towards_the_others():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        assert Links("", {0: connection}, 1, 1).interface() == "lo"
