"""Engines and what they set in a rank's environment; how a host ends when its ranks do."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from naign.cluster import ranks as module
from naign.cluster.ranks import Ranks, environment_of, find_engine
from naign.cluster.rejoin import Answer, Links
from naign.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, PEER_LOST, InputError

ALONE = Links(Answer(generation=1, port=29555), "127.0.0.1", {})


@pytest.mark.parametrize(
    ("gpus", "precision", "mixed"),
    [
        (2, "", "bf16"),
        (2, "fp32", "no"),
        (2, "auto", "no"),
        (0, "", "no"),
    ],
)
def test_the_precision_of_ddp_is_that_of_the_training(gpus, precision, mixed, monkeypatch):
    """What a configuration says contradicts another train.precision, and no user wrote this one."""
    monkeypatch.setattr("naign.distributed.host.count_gpus", lambda: gpus)
    variables = environment_of(find_engine("", precision))
    assert variables["ACCELERATE_MIXED_PRECISION"] == mixed
    assert variables["ACCELERATE_USE_CPU"] == ("false" if gpus else "true")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}),
        ("gpus", {"ACCELERATE_USE_CPU": "false", "ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("fsdp", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("zero3_offload", {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}),
    ],
)
def test_ranks_learn_of_their_engine_by_accelerates_variables(name, expected):
    assert expected.items() <= environment_of(find_engine(name)).items()


DEEPSPEED = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "mixed_precision": "no"}
DDP = "{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_GPU, mixed_precision: no}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "distributed_type"),
        ("a: [", "while parsing"),
        ("[" * 3000, "recursion"),
        ("distributed_type: !!bool x", "KeyError|x"),
        (json.dumps(DEEPSPEED | {"deepspeed_config": 5}), "no attribute"),
        (DDP.replace("MULTI_GPU", "MEGATRON_LM"), "distributed_type is MEGATRON_LM"),
        (DDP.replace("MULTI_GPU", "NO"), "starts one rank, and there are to be 2"),
        (json.dumps(DEEPSPEED | {"deepspeed_config": {"zero_stage": 9}}), "zero_stage is 9"),
        (json.dumps(DEEPSPEED | {"deepspeed_config": {"deepspeed_config_file": "/no.json"}}), "no such file"),
    ],
)
def test_an_engine_that_cannot_start_is_refused(text, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"is not a configuration of Accelerate: .*{said}"):
        find_engine(str(file))


def test_engines_are_found_by_name_and_by_file(tmp_path):
    file = tmp_path / "mine.json"
    settings = {"zero_stage": "2", "deepspeed_config_file": "none"}
    file.write_text(json.dumps(DEEPSPEED | {"deepspeed_config": settings}, indent="\t"))
    assert environment_of(find_engine(str(file)))["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    file.with_suffix(".yaml").write_text(DDP.replace("MULTI_GPU", "NO"))
    assert find_engine(str(file.with_suffix(".yaml")), ranks=1)["distributed_type"] == "NO"
    with pytest.raises(InputError, match="nor a name in launch/: cpu, fsdp, gpus"):
        find_engine("zero9")
    with pytest.raises(InputError, match="is neither a file"):
        find_engine("x" * 5000)


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start ranks that run a Python program each."""

    def begin(*programs, within=0.0):
        waiting = iter(programs)
        head = "import json, os, signal, sys, time\n"
        monkeypatch.setattr(module, "command_of", lambda _: [sys.executable, "-c", head + next(waiting)])
        count = len(programs)
        return Ranks(
            [],
            find_engine("cpu"),
            ALONE,
            folder=tmp_path,
            count=count,
            within=within,
        )

    return begin


def ended(ranks, seconds=30):
    end = time.monotonic() + seconds
    while ranks.running():
        assert time.monotonic() < end
        time.sleep(0.05)
    return ranks.outcome()


def ends(code):
    """A program that ends with a code when it is asked to."""
    return f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({code})); time.sleep(60)"


SLEEP = "time.sleep(60)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
SAID = "open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(json.dumps({'message': 'no such thing'})); sys.exit(2)"


@pytest.mark.parametrize(
    ("programs", "code", "said"),
    [
        (("", ""), DONE, ""),
        ((ends(76), SAID, ends(1)), BAD_INPUT, "rank 1 of this host ended with code 2, .*: no such thing"),
        (("time.sleep(1); sys.exit(76)", ends(1)), FAILED, "rank 1 of this host ended with code 1, crashed"),
        (("time.sleep(1); sys.exit(75)", ends(76)), PEER_LOST, "rank 1 of this host ended with code 76, a rank"),
        (("sys.exit(3)", SLEEP), 3, "rank 0 of this host ended with code 3, crashed"),
        (("os.abort()",), FAILED, "rank 0 of this host was ended by SIGABRT$"),
    ],
)
def test_a_host_ends_with_the_code_that_says_most(programs, code, said, start):
    with start(*programs, within=1) as ranks:
        found, text, killed = ended(ranks)
    assert found == code and not killed
    assert re.match(said, text)


def test_a_rank_that_was_killed_from_outside_is_told(start):
    with start("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(.5); sys.exit(76)") as ranks:
        assert ended(ranks) == (FAILED, "rank 0 of this host was ended by SIGKILL: out of memory?", True)


def test_the_launchers_own_kill_of_a_rank_that_hangs_is_not_called_out_of_memory(start):
    with start("time.sleep(.5); sys.exit(76)", DEAF) as ranks:
        code, text, killed = ended(ranks)
    assert code == PEER_LOST and not killed and "memory" not in text


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (ends(75), INTERRUPTED, "signal SIGUSR1: stopped on request"),
        (SLEEP, INTERRUPTED, "signal SIGUSR1: stopped on request"),  # it had no handlers yet
        (DEAF, FAILED, "rank 0 of this host did not end in 5 s: killed"),
    ],
)
def test_a_signal_is_passed_on(program, code, said, start):
    with start(program) as ranks:
        time.sleep(1)
        ranks.stop(signal.SIGUSR1)
        found, text, killed = ended(ranks)
    assert (found, killed) == (code, False) and text.startswith(said)


def test_what_ranks_have_started_is_killed_with_them(start, tmp_path):
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
    with start(f"{child}open('{tmp_path}/pid', 'w').write(str(child.pid))\n{SLEEP}"):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        process = psutil.Process(int((tmp_path / "pid").read_text()))
    gone, alive = psutil.wait_procs([process], timeout=10)
    assert gone or alive[0].status() == psutil.STATUS_ZOMBIE  # this host may lack a process that reaps it


def test_ranks_of_several_hosts_find_each_other(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: seen.append(env))
    links = Links(Answer(generation=1, port=29555, hosts=3, number=1), "127.0.0.1", {})
    Ranks(
        [],
        find_engine("cpu"),
        links,
        folder=tmp_path,
        count=2,
        within=1,
    )
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [[env[name] for name in names] for env in seen] == [
        ["2", "0", "6", "2", "127.0.0.1", "29555"],
        ["3", "1", "6", "2", "127.0.0.1", "29555"],
    ]


@pytest.mark.parametrize(("generation", "told"), [(1, None), (2, "2")])
def test_ranks_know_of_a_start_again_and_wait_for_access_then(generation, told, monkeypatch, tmp_path):
    """After a first start a wrong key is refused at once (tests/storage/test_retry.py)."""
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: seen.append(env))
    links = Links(Answer(generation=generation, port=29555), "127.0.0.1", {})
    Ranks(
        [],
        find_engine("cpu"),
        links,
        folder=tmp_path,
        count=1,
        within=1,
    )
    assert [env.get("NAIGN_GENERATION") for env in seen] == [told]
