"""The ranks of this host: started through Accelerate in this process, so that signals reach it, and ended with it."""

import argparse
import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import yaml

from pipeline.cluster.exit_codes import (
    CRASHED,
    MEANINGS,
    QUIET,
    SOON,
    Ending,
    explain,
    heeded,
    leave_at_once,
    say,
    weight,
)
from pipeline.cluster.place import Place
from pipeline.errors import FAILED, INTERRUPTED, PEER_LOST, InputError, on_signals, one_line

FIXED = (
    "--rdzv_backend=static",
    "--deepspeed_multinode_launcher=standard",
    "--num_cpu_threads_per_process=1",
    "--quiet",
)
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


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
        if idle():
            leave_at_once()
        silent = INTERRUPTED if _is_young() else FAILED  # ranks may not have handlers yet
        ending.listen()  # a second signal would end the wait for the ranks' checkpoint
        ending.stopping = True
        forwarded = signal.SIGTERM if number in (signal.SIGHUP, signal.SIGQUIT) else signal.Signals(number)
        raise SignalException(f"signal {number}", forwarded)  # on which torch's agent ends the ranks

    os.environ.update(NAIGN_ENDINGS=str(engine.parent), PET_SIGNALS_TO_HANDLE="SIGSYS")  # else torchrun replaces these
    on_signals(forward)

    def wait() -> None:
        if idle():
            say(f"no ranks after {QUIET:.0f} s: do all hosts reach port {port} of host 0 ({address})?")

    try:
        with heeded(lambda: idle() and not ending.stopping, leave_at_once, wait):
            try:
                start(parse([*_options(engine, place, processes, address, port), *training]))
                return 0
            except (ValueError, yaml.YAMLError) as error:
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
        reason = f"the rank of this host ended with code {code}, {MEANINGS.get(code, CRASHED)}"
    except DistError as error:  # from torch's agent, before there are ranks
        code, reason = PEER_LOST, f"host 0 ({address}, port {port}) is not reached: {one_line(error)}"
    ending.report(code, reason)
    return code


def _is_young() -> bool:
    """Whether this process started others within the last SOON seconds."""
    return any(child.create_time() > time.time() - SOON for child in psutil.Process().children())


def _options(engine: Path, place: Place, processes: int, address: str, port: int) -> list[str]:
    """The arguments of `accelerate launch`, up to the program that it starts."""
    return [
        *("--config_file", str(engine), "--num_machines", str(place.hosts), "--machine_rank", str(place.index)),
        *("--num_processes", str(place.hosts * processes), "--main_process_ip", address),
        *("--main_process_port", str(port if place.hosts > 1 else 0), *FIXED, str(TRAIN)),
    ]


def _codes(ranks: Sequence[Path]) -> list[str]:
    """The exit codes that ranks wrote, as text; '' for one that has written none."""
    return [file.read_text() if file.exists() else "" for file in ranks]


def _end_children(number: int) -> None:
    """Send `number` to the children that still run: Accelerate leaves a single rank to its caller.

    SIGINT becomes SIGTERM: a second one, after the terminal's, would end a rank without a checkpoint.
    """
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
