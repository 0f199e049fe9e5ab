"""The ranks of this host: which configuration of Accelerate starts them, in this process so that signals reach it."""

import argparse
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import yaml

from naign import shipped
from naign.cluster.exit_codes import CRASHED, MEANINGS, SOON, Ending, explain, leave_at_once, say, weight
from naign.cluster.place import Place
from naign.errors import FAILED, INTERRUPTED, PEER_LOST, SIGNALS, InputError, on_signals, one_line

QUIET = 30.0  # seconds without ranks after which the log mentions it
TRAIN = shipped("pipeline/train.py")
AUDITS = ("copies", "duplicates")  # commands of `naign` that ranks run instead of a training
POSSIBLE = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP", "False"),
    "mixed_precision": ("no", "fp16", "bf16", "None", "False"),
}
"""Values of a configuration of Accelerate with which training can start; `no` without quotes is False in YAML."""


def find_engine(name: str, precision: str = "", ranks: int = 2) -> str:
    """The text of an Accelerate configuration: of the file `name`, of the file of that name in launch/, or, for '', of
    DDP (`ranks`: 1 without) with train.precision=`precision`. InputError for no such file, or one that cannot start.
    """
    if not name:
        use_cpu, mixed = without_engine(precision)
        ddp = "MULTI_GPU" if ranks > 1 else '"NO"'
        kind = f"compute_environment: LOCAL_MACHINE, distributed_type: {ddp}, same_network: true"
        return f'{{{kind}, use_cpu: {use_cpu}, mixed_precision: "{mixed}"}}\n'
    for file in (Path(name), shipped(f"launch/{name}.yaml"), shipped(f"launch/{name}")):
        if os.path.isfile(file):
            try:
                return _read_engine(file)
            except Exception as error:  # of many kinds
                reason = one_line(error, 200)
                raise InputError(f"--engine {file} is no configuration of Accelerate: {reason}") from None
    known = ", ".join(sorted(file.stem for file in shipped("launch").glob("*.yaml")))
    raise InputError(f"--engine {name} is no file and no name in launch/{': ' + known if known else ''}")


def _read_engine(file: Path) -> str:
    """The configuration in a file, as YAML. Raises what Accelerate raises, ValueError for what it refuses too late."""
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(file))
    for key, values in POSSIBLE.items():
        value = getattr(config, key)
        if str(getattr(value, "value", value)) not in values:
            raise ValueError(f"{key} is {value}: it must be one of {', '.join(values[:5])}")
    deepspeed = config.deepspeed_config or {}
    if str(stage := deepspeed.get("zero_stage", 0)) not in ("0", "1", "2", "3"):
        raise ValueError(f"deepspeed_config.zero_stage is {stage}: it must be 0, 1, 2 or 3")
    settings = deepspeed.get("deepspeed_config_file")
    if settings and settings != "none" and not os.path.isfile(str(settings)):
        raise ValueError(f"deepspeed_config_file {settings}: no such file")
    text = file.read_text()
    return yaml.safe_dump(json.loads(text)) if file.suffix == ".json" else text


def without_engine(precision: str) -> tuple[str, str]:
    """use_cpu and mixed_precision as in launch/gpus.yaml and launch/cpu.yaml, except that train.precision decides."""
    from naign.distributed.host import count_gpus

    return ("false", "no" if precision else "bf16") if count_gpus() else ("true", "no")


def program_of(arguments: Sequence[str]) -> list[str]:
    """What Python, and Accelerate's launcher, run as the ranks' program."""
    return ["-m", "naign.cli"] if arguments and arguments[0] in AUDITS else [str(TRAIN)]


def become_rank(precision: str, training: Sequence[str]) -> NoReturn:
    """Continue this process as the only rank of the training, without Accelerate's launcher."""
    use_cpu, mixed = without_engine(precision)
    os.environ |= {"ACCELERATE_USE_CPU": use_cpu, "ACCELERATE_MIXED_PRECISION": mixed}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until training sets its handlers
    os.execv(sys.executable, [sys.executable, *program_of(training), *training])


def require_gpus(wanted: int, processes: int, engine: str) -> bool:
    """Whether ranks use GPUs. InputError or Unavailable where there are fewer than --gpus=`wanted`, or than ranks."""
    from naign.distributed.host import check_gpus, count_gpus

    check_gpus(f"--gpus {wanted}", wanted)
    config = yaml.safe_load(engine)
    on_gpus = count_gpus() or config.get("distributed_type") in ("MULTI_GPU", "FSDP")  # DeepSpeed also runs on CPUs
    if on_gpus := on_gpus and not config.get("use_cpu"):
        check_gpus(f"{processes} ranks on GPUs are to start here (on CPUs: --engine cpu)", processes)
    return bool(on_gpus)


def run_ranks(
    engine: Path, place: Place, processes: int, address: str, port: int, training: Sequence[str], ending: Ending
) -> int:
    """Start this host's ranks through Accelerate, wait for them, and log why they ended. Returns the host's code.

    Ranks write their codes into the folder of `engine`, Accelerate's configuration. `address` is that of host 0.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parse, start = load_launcher()
    ranks = [engine.parent / str(rank) for rank in range(processes)]
    silent = FAILED  # the code of a rank that wrote none

    def idle() -> bool:
        return not psutil.Process().children() and not any(file.exists() for file in ranks)

    def forward(number: int, _: object) -> None:
        nonlocal silent
        ending.listen()  # a second signal would interrupt this, or end the wait for the ranks' checkpoint
        ending.stopping = True
        if idle():
            leave_at_once()
        if any(child.create_time() > time.time() - SOON for child in psutil.Process().children()):
            silent = INTERRUPTED  # it may not have handlers yet
        forwarded = signal.SIGTERM if number in (signal.SIGHUP, signal.SIGQUIT) else signal.Signals(number)
        raise SignalException(f"signal {number}", forwarded)  # on which torch's agent ends the ranks

    os.environ.update(NAIGN_ENDINGS=str(engine.parent), PET_SIGNALS_TO_HANDLE="SIGSYS")  # else torchrun replaces these
    on_signals(forward)
    unreached = f"no ranks after {QUIET:.0f} s: do all hosts reach port {port} of host 0 ({address})?"
    try:
        with _heeded(idle, ending, unreached):
            try:
                options = _options(engine, place, processes, address, port)
                start(parse([*options, *program_of(training), *training]))
                return 0
            except (ValueError, ImportError, yaml.YAMLError) as error:
                if not idle():  # not from Accelerate, which refuses before it starts anything
                    raise
                raise InputError(f"the configuration of Accelerate (--engine): {one_line(error)}") from None
            finally:
                ending.listen()
    except SignalException as error:
        _end_children(error.sigval)
        code = max((int(text or silent) for text in _codes(ranks)), key=weight)
        reason = f"signal {error.sigval.name}: {MEANINGS.get(code, 'some ranks did not end in time, or crashed')}"
    except ChildFailedError as error:
        code, reason, ending.killed = explain(error.failures)
    except SystemExit:  # from Accelerate, which starts one rank without torch's agent and hides its code
        text = _codes(ranks)[0]
        code, ending.killed = int(text or FAILED), not text
        reason = f"the rank of this host ended with code {code}, {MEANINGS.get(code, CRASHED) if text else 'killed'}"
    except DistError as error:  # from torch's agent, before there are ranks
        code, reason = PEER_LOST, f"host 0 ({address}, port {port}) is not reached: {one_line(error)}"
    ending.report(code, reason)
    return code


@contextlib.contextmanager
def _heeded(idle: Callable[[], bool], ending: Ending, unreached: str) -> Iterator[None]:
    """While the main thread may wait in C++, where no handler runs: leave SOON seconds after a signal if no rank is
    there, and log `unreached` if there is none after QUIET seconds.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before, over = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False), threading.Event()

    def heed() -> None:
        while reader.recv(1):
            if not over.wait(SOON) and idle() and not ending.stopping:
                leave_at_once()

    def mention() -> None:
        if not over.wait(QUIET) and idle():
            say(unreached)

    for act in (heed, mention):
        threading.Thread(target=act, name="signals", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        writer.close()


def _options(engine: Path, place: Place, processes: int, address: str, port: int) -> list[str]:
    """The arguments of `accelerate launch`, up to the program that it starts."""
    return [
        *("--config_file", str(engine), "--num_machines", str(place.hosts), "--machine_rank", str(place.index)),
        *("--num_processes", str(place.hosts * processes), "--main_process_ip", address),
        *("--main_process_port", str(port if place.hosts > 1 else 0), "--rdzv_backend=static", "--quiet"),
        *("--deepspeed_multinode_launcher=standard", "--num_cpu_threads_per_process=1"),
    ]


def _codes(ranks: Sequence[Path]) -> list[str]:
    """The exit codes that ranks wrote, as text; '' for one that has written none."""
    return [file.read_text() if file.exists() else "" for file in ranks]


def _end_children(number: int) -> None:
    """Send `number` to the children that still run: Accelerate leaves a single rank to its caller."""
    # A second SIGINT, after the terminal's, would end a rank without a checkpoint.
    number = signal.SIGTERM if number == signal.SIGINT else number
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
    for child in psutil.wait_procs(children, timeout=float(os.environ["PET_SHUTDOWN_TIMEOUT"]))[1]:
        child.kill()


def load_launcher() -> tuple[Callable[[list[str]], argparse.Namespace], Callable[[argparse.Namespace], None]]:
    """The functions of `accelerate launch` that parse its arguments and run them. Imports torch's agent."""
    import torch.distributed.run  # noqa: F401
    from accelerate.commands.launch import launch_command, launch_command_parser

    gc.enable()  # disabled by `naign launch` for the imports
    return launch_command_parser().parse_args, launch_command
