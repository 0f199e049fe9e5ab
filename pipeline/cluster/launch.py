"""`naign launch [options] [--config FILE] [--section.key=value ...]`: start this host's ranks of a training.

The same command on every host of a Kubernetes Job, a JobSet, a Kubeflow TrainJob or a Slurm step (place.py says
which variables are read), and on a machine alone. It waits until all hosts of this start are there, starts the
ranks through Accelerate in its own process, so that signals reach it. Where another host is lost and the orchestrator
replaces it, this one ends its ranks and meets the others again. It ends with one of these codes:

  0   done, also where the run in the bucket was done already
  2   bad configuration or input: to be corrected, not tried again
  75  stopped on request after a checkpoint: to be started again
  76  another host did not come, or was lost where none is replaced: to be started again, through no fault of this one
  else  a crash: to be tried again a few times
"""

import argparse
import contextlib
import gc
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipeline.cluster.again import check_progress, meet_again
from pipeline.cluster.engine_file import find_engine, require_gpus, without_engine
from pipeline.cluster.exit_codes import (
    CRASHED,
    MEANINGS,
    QUIET,
    SOON,
    Ending,
    explain,
    heeded,
    program,
    say,
    weight,
)
from pipeline.cluster.meeting import TELLING, Links, interface_of, listen, meet, turn_away
from pipeline.cluster.place import RANKS, Place, find_place, find_ports
from pipeline.errors import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    PEER_LOST,
    SIGNALS,
    InputError,
    PeerLost,
    Unavailable,
    on_signals,
    one_line,
)
from pipeline.terminal import outlive_terminal

FIXED = (
    "--rdzv_backend=static",
    "--deepspeed_multinode_launcher=standard",
    "--num_cpu_threads_per_process=1",
    "--quiet",
)
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def build_parser() -> argparse.ArgumentParser:
    """Of the options that are not the training's."""
    parser = argparse.ArgumentParser(
        program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--engine", default="", help="a configuration of Accelerate: a file, or a name in launch/ as zero2; default: "
        "DDP, on the GPUs where there are any")  # fmt: skip
    (meeting, ranks), count, port = find_ports(os.environ), _between(0, RANKS, int), _between(1, 65535, int)
    add("--processes", type=count, default=0, help="ranks on this host; default: one a GPU, or one")
    add("--gpus", type=count, default=0, help="GPUs that this host must have; default: as many as there are, or none")
    add("--port", type=port, default=ranks, help="of host 0, for the ranks (%(default)s)")
    add("--meeting-port", type=port, default=meeting, help="of host 0, where hosts wait for each other (%(default)s)")
    add("--wait", type=_between(1, 10**6), default=900, help="seconds to wait for the other hosts (%(default)s)")
    add("--reach", type=_between(0, 10**6), default=300, help="seconds to wait for run.remote's bucket (%(default)s)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Start the ranks and wait for them. Returns the exit code; errors of the user are reported, not raised."""
    outlive_terminal()
    parser, environ = build_parser(), dict(os.environ)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch loads: its sockets log a stack of 20 lines
    on_signals(_leave_at_once)  # the first process of a container gets no others
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which came while it executed itself anew
    options, training = parser.parse_known_args(arguments)
    try:
        code, reason = _launch(options, training, environ), ""
    except (PeerLost, Unavailable, InputError) as error:
        code = error.code
        reason = {FAILED: "failed: ", BAD_INPUT: "error: "}.get(code, "") + str(error)
    on_signals(signal.SIG_IGN)  # they change nothing any more
    if reason:
        say(reason)
    return code


def _leave_at_once(*_: object) -> None:
    """End on a signal while there are no ranks, when nothing is lost."""
    say(MEANINGS[INTERRUPTED])
    os._exit(INTERRUPTED)


def _between(least: float, most: float, kind: type[float] = float) -> Callable[[str], float]:
    """What converts an option's text, for argparse."""

    def number(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{value}: it must lie between {least} and {most}")
        return value

    return number


def _launch(options: argparse.Namespace, training: Sequence[str], environ: Mapping[str, str]) -> int:
    from pipeline.config import parse
    from pipeline.distributed.gpus import count_gpus
    from pipeline.storage.store import use_endpoint

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of whatever started this: ranks get their own
    config = parse(list(training))  # here, too, so that a mistake is reported at once, and by one process
    use_endpoint(config.data.endpoint)
    place = find_place(os.environ)
    processes = options.processes or place.processes or count_gpus() or 1
    links, engine = _meet_others(options, config, place, processes)
    if links is None:
        return 0
    os.environ["NAIGN_LAUNCHER"] = str(os.getpid())  # ranks end with this process
    if place.hosts * processes == 1 and not options.engine:
        use_cpu, precision = without_engine(config.train.precision)
        os.environ |= {"ACCELERATE_USE_CPU": use_cpu, "ACCELERATE_MIXED_PRECISION": precision}
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until training has handlers for them
        os.execv(sys.executable, [sys.executable, str(TRAIN), *training])
    os.environ["PET_SHUTDOWN_TIMEOUT"] = str(math.ceil(config.stop.within) + 5)  # torchrun kills ranks after so long
    os.environ["PET_RDZV_ID"] = f"{place.start}.{links.generation}"  # agents of different generations never meet
    ending, begun = Ending(patience=config.stop.within + 30, alone=place.hosts == 1), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if place.is_replaced:

            def stay() -> None:
                shutil.rmtree(scratch, ignore_errors=True)
                meet_again(environ, PEER_LOST, ending, links, seconds=0)

            ending.stay = stay
        links.watch(ending.note)
        file = Path(scratch) / "engine.yaml"
        file.write_text(engine)
        code = run_ranks(file, place, processes, links.address, options.port, training, ending)
    seconds = time.monotonic() - begun
    if code == PEER_LOST:
        links.leave(code, lost=ending.lost)  # before it waits for another host's code, which may wait for this one
    code = ending.judge(code)
    if code == 0 and config.run.remote and place.index == 0:
        done = ThreadPoolExecutor(1).submit(_is_done, config, options.reach)  # a signal does not end a request
        ending.wait_for(done.done)
        if not done.done() or not done.result():
            code = FAILED if done.done() else INTERRUPTED
            say(f"the run is done, but {config.run.remote} does not hold its end: started again, it is sent once more")
    links.leave(code, lost=ending.lost or ending.killed)
    if code == 0 and config.run.remote and place.index and ending.heard(0, options.reach + 60) != 0:
        code = INTERRUPTED if ending.asked else PEER_LOST
    if place.is_replaced and ending.may_go_on(code):
        return meet_again(environ, code, ending, links, seconds)
    return code


def _meet_others(options: argparse.Namespace, config: Any, place: Place, processes: int) -> tuple[Links | None, str]:
    """Connections to the other hosts once all are here, and the engine's configuration; None if the run is done."""
    listener = listen(place, options.meeting_port)
    with listener or contextlib.nullcontext():
        try:
            engine = find_engine(options.engine, place.hosts * processes, config.train.precision)
            require_gpus(options.gpus, processes, engine)
            if _is_done(config, options.reach):
                say(f"nothing left to do: the run in {config.run.remote} is done")
                return None, ""
            _check_host(options, place, processes)
            if place.hosts > 1:  # what takes a second to load is loaded while the others are waited for
                _program()
            links = meet(place, port=options.meeting_port, within=options.wait, say=say, listener=listener)
        except InputError as error:
            if listener:  # this is host 0: the others end for the same reason
                on_signals(lambda *_: os._exit(BAD_INPUT))
                say(f"telling the other hosts, for {TELLING:.0f} s at most: {error}")
                turn_away(listener, place, error)
            raise
    if place.hosts > 1:
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_of(links.address)):
            os.environ["GLOO_SOCKET_IFNAME"] = name  # else gloo takes what the host's name means, often 127.0.1.1
        say(f"all hosts are here; host 0 is {links.address}")
        check_progress(links)
    return links, engine


def _check_host(options: argparse.Namespace, place: Place, processes: int) -> None:
    """Raise InputError where this host lacks what its ranks need."""
    if place.hosts > 1:
        say(f"host {place.index} of {place.hosts}, {processes} ranks each, under {place.orchestrator}")
        if place.index == 0:
            try:
                socket.create_server(("", options.port)).close()
            except OSError as error:
                problem = f"port {options.port} is taken on host 0 ({error.strerror})"
                raise InputError(f"{problem}: choose another --port") from None


def _is_done(config: Any, within: float) -> bool:
    """Whether the bucket holds the finished run. InputError or Unavailable if it is out of reach for so long."""
    from pipeline.training.run_folder import is_done

    end = time.monotonic() + within  # the bucket's server may be starting, too
    while config.run.remote:
        try:
            return is_done(config)
        except Unavailable as error:
            if time.monotonic() > end:
                kind = Unavailable if "NAIGN_GENERATION" in os.environ else InputError  # it could be reached before
                said = f"run.remote cannot be reached: {str(error).partition('. Check ')[0]}"
                raise kind(f"{said}; check its name and AWS_ENDPOINT_URL") from None
            say(f"waiting for {config.run.remote}: {error}")
    return False


def run_ranks(
    engine: Path, place: Place, processes: int, address: str, port: int, training: Sequence[str], ending: Ending
) -> int:
    """Start this host's ranks through Accelerate and wait for them. Reports why they ended; returns their code.

    Ranks write their codes into the folder of `engine`, Accelerate's configuration. `address` is that of host 0.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parse, start = _program()
    ranks = [engine.parent / str(rank) for rank in range(processes)]
    silent = FAILED  # the code of a rank that ended without a word

    def idle() -> bool:
        return not psutil.Process().children() and not any(file.exists() for file in ranks)

    def forward(number: int, _: object) -> None:
        nonlocal silent
        if idle():
            _leave_at_once()
        silent = INTERRUPTED if _is_young() else FAILED  # it may not have had handlers yet
        ending.listen()  # a second signal would end the wait for the ranks' checkpoint
        ending.stopping = True
        raise SignalException(f"signal {number}", _for_ranks(number))  # by which the agent ends the ranks

    os.environ["NAIGN_ENDINGS"] = str(engine.parent)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGSYS"  # torchrun's handlers would replace ours; it wants at least one
    on_signals(forward)

    def wait() -> None:
        if idle():
            say(f"no ranks after {QUIET:.0f} s: do all hosts reach port {port} of host 0 ({address})?")

    try:
        with heeded(lambda: idle() and not ending.stopping, _leave_at_once, wait):
            try:
                start(parse([*_options(engine, place, processes, address, port), *training]))
                return 0
            except (ValueError, yaml.YAMLError) as error:
                if not idle():  # it is not of Accelerate, before it starts anything
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
    except SystemExit:  # of one rank that Accelerate starts without torch's agent; it hides the code
        text = _codes(ranks)[0]
        code, ending.killed = int(text or FAILED), not text
        reason = f"the rank of this host ended with code {code}, {MEANINGS.get(code, CRASHED)}"
    except DistError as error:  # of torch's agent, before there are ranks
        code, reason = PEER_LOST, f"host 0 ({address}, port {port}) is not reached: {one_line(error)}"
    ending.report(code, reason)
    return code


def _for_ranks(number: int) -> signal.Signals:
    return signal.SIGTERM if number in (signal.SIGHUP, signal.SIGQUIT) else signal.Signals(number)


def _is_young() -> bool:
    """Whether this process has just started others."""
    return any(child.create_time() > time.time() - SOON for child in psutil.Process().children())


def _options(engine: Path, place: Place, processes: int, address: str, port: int) -> list[str]:
    """Of `accelerate launch`, up to the program that it starts."""
    return [
        *("--config_file", str(engine), "--num_machines", str(place.hosts), "--machine_rank", str(place.index)),
        *("--num_processes", str(place.hosts * processes), "--main_process_ip", address),
        *("--main_process_port", str(port if place.hosts > 1 else 0), *FIXED, str(TRAIN)),
    ]


def _codes(ranks: Sequence[Path]) -> list[str]:
    """What ranks wrote when they ended, as text; '' of one that has not ended, or did so without a word."""
    return [file.read_text() if file.exists() else "" for file in ranks]


def _end_children(number: int) -> None:
    """By signal `number`, those that torchrun has not ended: of one rank Accelerate leaves that to us.

    A second SIGINT, after the terminal's, would end a rank without a checkpoint.
    """
    number = signal.SIGTERM if number == signal.SIGINT else number
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
    for child in psutil.wait_procs(children, timeout=float(os.environ["PET_SHUTDOWN_TIMEOUT"]))[1]:
        child.kill()


def _program() -> tuple[Callable[[list[str]], argparse.Namespace], Callable[[argparse.Namespace], None]]:
    """Accelerate's `accelerate launch`, and torch's agent with it: what parses its arguments, and what runs them."""
    import torch.distributed.run  # noqa: F401
    from accelerate.commands.launch import launch_command, launch_command_parser

    gc.enable()  # which `naign launch` disabled for the imports
    return launch_command_parser().parse_args, launch_command
