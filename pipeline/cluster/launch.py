"""`naign launch [options] [--config FILE] [--section.key=value ...]`: start this host's ranks of a training.

The same command on every host of a Kubernetes Job, a JobSet, a Kubeflow TrainJob or a Slurm step (place.py says
which variables are read), and on a machine alone. It waits until all hosts of this start are there, starts the
ranks through Accelerate in this very process, so that signals arrive, and ends with the code of what ended them:

  0   done, also where the run in the bucket was done already
  2   bad configuration or input: to be corrected, not tried again
  75  stopped on request after a checkpoint: to be started again
  76  another host was lost, or did not come: to be started again, through no fault of this one
  else  a crash: to be tried again a few times
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pipeline.cluster.meeting import TELLING, interface_of, listen, meet, turn_away
from pipeline.cluster.place import Place, find_place, find_ports
from pipeline.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST, InputError, PeerLost, Unavailable

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "pipeline/train.py"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
"""Requests to end, which are handed on to the ranks; Slurm's is USR1."""

MEANINGS = {
    BAD_INPUT: "bad configuration or input, which is not tried again",
    INTERRUPTED: "stopped on request; the same command goes on from the newest checkpoint",
    PEER_LOST: "another rank or host is not there; start all again and they go on from the newest checkpoint",
}


def main(arguments: Sequence[str]) -> int:
    """Start the ranks; the exit code. Never raises for a user's mistake."""
    parser = argparse.ArgumentParser(
        "naign launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--engine", default="", help="a configuration of Accelerate: a file, or a name in launch/ as zero2; default: "
        "DDP, on the GPUs where there are any")  # fmt: skip
    add("--processes", type=int, default=0, help="ranks on this host; default: one a GPU, or one")
    add("--gpus", type=int, default=0, help="GPUs that this host must have; default: as many as there are, or none")
    meeting, ranks = find_ports(os.environ)
    add("--port", type=int, default=ranks, help="of host 0, for the ranks (%(default)s)")
    add("--meeting-port", type=int, default=meeting, help="of host 0, where hosts wait for each other (%(default)s)")
    add("--wait", type=float, default=900, help="seconds to wait for the other hosts (%(default)s)")
    add("--reach", type=float, default=300, help="seconds to wait for the bucket of run.remote (%(default)s)")
    _on_signals(_leave_at_once, SIGNALS[:3])  # the first process of a container gets no others
    options, training = parser.parse_known_args(arguments)
    reason = ""
    try:
        code = _launch(options, training)
    except PeerLost as error:
        code, reason = PEER_LOST, f"{error}: {MEANINGS[PEER_LOST]}"
    except Unavailable as error:
        code, reason = FAILED, f"failed: {error}"
    except InputError as error:
        code, reason = BAD_INPUT, f"error: {error}"
    _on_signals(signal.SIG_IGN)  # they change nothing any more
    if reason:
        say(reason)
    return code


def say(text: str) -> None:
    print(f"naign launch: {text}", file=sys.stderr, flush=True)


def _on_signals(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers, numbers: Sequence[int] = SIGNALS
) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """While there are no ranks: nothing is lost."""
    say(MEANINGS[INTERRUPTED])
    os._exit(INTERRUPTED)


def _check(options: argparse.Namespace) -> None:
    seconds, ports = 10**6, (1, 65535)
    limits = {"processes": (0, 1024), "gpus": (0, 1024), "port": ports, "meeting_port": ports}
    for name, (least, most) in (limits | {"wait": (1, seconds), "reach": (0, seconds)}).items():
        option, value = "--" + name.replace("_", "-"), getattr(options, name)
        if not least <= value <= most:
            raise InputError(f"{option} is {value}: it must lie between {least} and {most}")


def _launch(options: argparse.Namespace, training: Sequence[str]) -> int:
    from pipeline.config import parse
    from pipeline.storage.store import use_endpoint

    _check(options)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of whatever started this: ranks get their own
    try:
        config = parse(list(training))  # here, too: a mistake in it is told at once, and by one
    except SystemExit as error:
        if not error.code:
            raise
        raise InputError("an option is wrong, as said above") from None
    use_endpoint(config.data.endpoint)
    place = find_place(os.environ)
    processes = options.processes or place.processes or _gpus() or 1
    ranks = place.hosts * processes
    listener = listen(place, options.meeting_port)
    with listener or contextlib.nullcontext():
        try:
            if _is_done(config, options.reach):
                say(f"nothing left to do: the run in {config.run.remote} is done")
                return 0
            engine = find_engine(options.engine, ranks)
            _check_host(options, place, processes)
            links = meet(place, port=options.meeting_port, within=options.wait, say=say, listener=listener)
        except InputError as error:
            if listener:
                _on_signals(lambda *_: os._exit(BAD_INPUT))
                say(f"telling the other hosts, for {TELLING:.0f} s at most: {error}")
                turn_away(listener, place, f"host 0: {error}")
            raise
    if place.hosts > 1:
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_of(links.address)):
            os.environ["GLOO_SOCKET_IFNAME"] = name  # else gloo takes what the host's name means, often 127.0.1.1
        say(f"all hosts are here; host 0 is {links.address}")
    if ranks == 1 and not options.engine:
        os.environ |= {"ACCELERATE_USE_CPU": "false" if _gpus() else "true", "ACCELERATE_MIXED_PRECISION": _precision()}
        os.execv(sys.executable, [sys.executable, str(TRAIN), *training])
    # torchrun's options: the signals that it hands on, and when it kills what does not end after one.
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in SIGNALS)
    os.environ["PET_SHUTDOWN_TIMEOUT"] = str(math.ceil(config.stop.within) + 5)
    ending = Ending(patience=config.stop.within + 30, alone=place.hosts == 1)
    links.watch(ending.note)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "engine.yaml"
        file.write_text(engine)
        code = ending.judge(run_ranks(file, place, processes, links.address, options.port, training, ending))
    if code == 0 and config.run.remote and place.index == 0:
        held = ThreadPoolExecutor(1).submit(_is_done, config, options.reach)  # a signal does not end a request
        ending.wait_for(held.done)
        if not held.done() or not held.result():
            code = FAILED if held.done() else INTERRUPTED
            say(f"the run is done, but {config.run.remote} does not hold its end: started again, it is sent once more")
    links.leave(code, lost=ending.lost)
    if code == 0 and config.run.remote and place.index and ending.heard(0, options.reach + 60) != 0:
        code = INTERRUPTED if ending.asked else PEER_LOST
    return code


def _check_host(options: argparse.Namespace, place: Place, processes: int) -> None:
    """Whether this host has what its ranks need."""
    if _gpus() < options.gpus:
        found = f"{options.gpus} GPUs should be here, torch can use {_gpus()}"
        if _is_without_gpus():
            raise InputError(f"{found}: this torch was built without; take the image of --target cuda")
        raise Unavailable(f"{found}: see nvidia.com/gpu in the limits, and the node's driver")
    if place.hosts > 1:
        say(f"host {place.index} of {place.hosts}, {processes} ranks each, under {place.orchestrator}")
        if place.index == 0:
            _check_free(options.port)


class Ending:
    """What to do when another host ends: this host's ranks should end by themselves soon, and are made to."""

    def __init__(self, patience: float, *, alone: bool = False) -> None:
        self._patience, self._alone = patience, alone
        self._over = threading.Event()
        self._codes: dict[int, int | None] = {}
        self.lost = False
        """Whether a host vanished, as far as this one knows."""
        self.asked = False
        """Whether this host was asked to end after its ranks had ended, or had been asked: it waits no more."""

    def listen(self) -> None:
        """Only note signals from now on: torchelastic's handler raises, in the midst of whatever comes next."""
        _on_signals(self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def wait_for(self, met: Callable[[], bool], within: float = math.inf) -> None:
        """Return when it is met, after so many seconds, or when this host is asked to end."""
        end = time.monotonic() + within
        while not met() and not self.asked and time.monotonic() < end:
            time.sleep(0.05)

    def note(self, host: int, code: int | None, lost: bool) -> None:
        """Host `host` ended with `code`, None if it did not say; it knew of a host that was `lost`. Waits for this
        host's ranks to end; to be called in a thread.
        """
        over = self._over.is_set()
        if not over:
            self.lost = self.lost or code is None or lost
        self._codes[host] = code
        if over:
            return
        say(f"host {host} ended" + (f" with code {code}" if code is not None else " without a word: lost"))
        if not self._over.wait(GRACE if code is None else self._patience):
            say("this host's ranks do not end: killed")
            self.lost = True
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not self._over.wait(GRACE):
                os._exit(PEER_LOST)

    def judge(self, code: int) -> int:
        """This host's ranks ended with `code`: what to end with.

        A crash counts, but for one that another host's end brought about: those who saw a host vanish say so.
        """
        if code not in (0, BAD_INPUT, INTERRUPTED) and not self._alone:
            self.wait_for(lambda: bool(self._codes), GRACE)
        self._over.set()
        if code == PEER_LOST and BAD_INPUT in self._codes.values():  # Slurm takes the highest of all hosts' codes
            return BAD_INPUT
        return PEER_LOST if self.lost and code not in (0, BAD_INPUT, INTERRUPTED) else code

    def heard(self, host: int, within: float) -> int | None:
        """What a host ended with, once it has; None if it vanished, or says nothing."""
        self.wait_for(lambda: host in self._codes, within)
        return self._codes.get(host)


GRACE = 10.0
"""Seconds for ranks to notice themselves that another host is gone."""


def _is_done(config: Any, within: float) -> bool:
    """Whether the bucket holds the finished run. InputError if it stays out of reach for so many seconds: its server
    may be starting beside this host, or its name be not known yet.
    """
    from pipeline.training.run_folder import is_done

    end = time.monotonic() + within
    while config.run.remote:
        try:
            return is_done(config)
        except Unavailable as error:
            if time.monotonic() > end:
                reason = str(error).partition(". Check ")[0]
                raise InputError(
                    f"run.remote cannot be reached: {reason}; check its name and AWS_ENDPOINT_URL"
                ) from None
            say(f"waiting for {config.run.remote}: {error}")
    return False


def run_ranks(
    engine: Path,
    place: Place,
    processes: int,
    address: str,
    port: int,
    training: Sequence[str],
    ending: Ending,
) -> int:
    """Start this host's ranks through Accelerate and wait for them; the exit code, of which the reason is told."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def hand_on(signum: int, frame: FrameType | None) -> None:
        ending.listen()  # a second signal would end the wait for the ranks' checkpoint
        raise api.SignalException(f"signal {signum}", signal.Signals(signum))

    api._terminate_process_handler = hand_on
    arguments = [
        *("--config_file", str(engine), "--num_machines", str(place.hosts), "--machine_rank", str(place.index)),
        *("--num_processes", str(place.hosts * processes), "--main_process_ip", address),
        *("--main_process_port", str(port if place.hosts > 1 else 0), "--rdzv_backend", "static"),
        *("--deepspeed_multinode_launcher", "standard", "--num_cpu_threads_per_process", "1", "--quiet"),
        *(str(TRAIN), *training),
    ]
    os.environ["NAIGN_ENDINGS"] = str(engine.parent)
    try:
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        finally:
            ending.listen()
    except api.SignalException as error:
        codes = [_ending(engine.parent / str(rank)) for rank in range(processes)]
        code = max(codes, key=_weight)
        say(f"signal {error.sigval.name}: {MEANINGS.get(code, 'some ranks did not end in time, or crashed')}")
        return code
    except ChildFailedError as error:
        code, reason = explain(error.failures)
        say(reason)
        return code
    return 0


def explain(failures: Mapping[int, Any]) -> tuple[int, str]:
    """The code that says most of those by which ranks of this host ended, and a sentence for the log's last line.

    `failures` are torchelastic's ProcessFailure by local rank; in the end it kills those that go on, long after.
    """
    first = min(failure.timestamp for failure in failures.values())
    causes = [found for found in failures.values() if found.exitcode >= 0 or found.timestamp < first + GRACE]
    failure = max(causes, key=lambda failure: _weight(failure.exitcode))
    code = int(failure.exitcode)
    if code < 0:
        killer = signal.Signals(-code).name
        hint = ": out of memory?" if -code == signal.SIGKILL else ""
        return FAILED, f"rank {failure.local_rank} of this host was ended by {killer}{hint}"
    said = "" if failure.message == "<N/A>" or "traceback" in failure.message else f": {failure.message}"
    meaning = MEANINGS.get(code, "crashed; see its last words above")
    return code, f"rank {failure.local_rank} of this host ended with code {code}, {meaning}{said}"


def _weight(code: int) -> int:
    return {BAD_INPUT: 3, PEER_LOST: 1, INTERRUPTED: 0, 0: 0}.get(code, 2)


def _ending(file: Path) -> int:
    """What a rank wrote of its end; FAILED if nothing."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return FAILED


def find_engine(name: str, ranks: int) -> str:
    """The text of an Accelerate configuration: of a file, of a name in launch/, or DDP on what is here."""
    if name:
        from accelerate.commands.config.config_args import load_config_from_file

        for file in (Path(name), ROOT / f"launch/{name}.yaml", ROOT / f"launch/{name}"):
            if len(name) < 200 and file.is_file():
                try:
                    load_config_from_file(str(file))
                    return file.read_text()
                except Exception as error:  # of many kinds
                    reason = " ".join(str(error).split())[:200]
                    raise InputError(f"--engine {file} is no configuration of Accelerate: {reason}") from None
        known = ", ".join(sorted(file.stem for file in (ROOT / "launch").glob("*.yaml")))
        raise InputError(f"--engine {name} is no file and no name in launch/{': ' + known if known else ''}")
    return "\n".join(
        (
            "compute_environment: LOCAL_MACHINE",
            f"distributed_type: {'MULTI_GPU' if ranks > 1 else 'NO'}",
            f"use_cpu: {'false' if _gpus() else 'true'}",
            "num_machines: 1",
            f"num_processes: {ranks}",
            "machine_rank: 0",
            f'mixed_precision: "{_precision()}"',
            "rdzv_backend: static",
            "same_network: true",
        )
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _is_without_gpus() -> bool:
    import torch

    return not torch.backends.cuda.is_built()


def _precision() -> str:
    """Of a launch without --engine, as launch/gpus.yaml and launch/cpu.yaml have it; train.precision goes before."""
    return "bf16" if _gpus() else "no"


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(f"port {port} is taken on host 0 ({error.strerror}): choose another --port") from None
