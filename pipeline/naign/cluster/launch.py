"""`naign launch [options] [--config FILE] [--section.key=value ...]`: start this host's ranks of a training; or those
of an audit: `naign launch [options] copies RUN ...` and `naign launch [options] duplicates --data PATH ...`.

The same command runs on a single machine and on every host of a Kubernetes Job or JobSet, a Kubeflow TrainJob or a
Slurm step. It waits for all hosts of this start, then runs Accelerate's launcher in this process, so that signals reach
it. Where a lost host is replaced, this one ends its ranks and meets the others again. Exit codes: 0 done, 2 bad
configuration or input, 75 stopped after a checkpoint, 76 another host is lost, any other a crash (docs/training.md).
"""

import argparse
import contextlib
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from naign.cluster.exit_codes import Ending, leave_at_once, program, say
from naign.cluster.local_ranks import AUDITS, become_rank, find_engine, load_launcher, require_gpus, run_ranks
from naign.cluster.meeting import TELLING, Links, listen, meet, reject_all
from naign.cluster.place import RANKS, Place, find_place, find_ports
from naign.cluster.rejoin import check_progress, meet_again
from naign.errors import BAD_INPUT, FAILED, INTERRUPTED, PEER_LOST, InputError, PeerLost, Unavailable, on_signals
from naign.terminal import outlive_terminal


def build_parser() -> argparse.ArgumentParser:
    """The parser of the launcher's options; all others are settings of the training."""
    parser = argparse.ArgumentParser(
        program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--engine", default="", help="a configuration of Accelerate: a file, or a name in launch/, such as zero2; "
        "default: DDP, on GPUs if there are any")  # fmt: skip
    (meeting, ranks), count, port = find_ports(os.environ), _between(0, RANKS, int), _between(1, 65535, int)
    add("--processes", type=count, default=0, help="ranks on this host; default: one per GPU, or one")
    add("--gpus", type=count, default=0, help="GPUs that this host must have; default: any number")
    add("--port", type=port, default=ranks, help="port of host 0 for the ranks (%(default)s)")
    add("--meeting-port", type=port, default=meeting, help="port of host 0 for the meeting of hosts (%(default)s)")
    add("--metrics", type=port, default=0, help="port of this host for /metrics and /healthz; default: none")
    add("--wait", type=_between(1, 10**6), default=900, help="seconds to wait for the other hosts (%(default)s)")
    add("--reach", type=_between(0, 10**6), default=300, help="seconds to wait for run.remote's bucket (%(default)s)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Start the ranks and wait for them. Returns the exit code; InputError, PeerLost and Unavailable are logged."""
    outlive_terminal()
    parser, environ = build_parser(), dict(os.environ)
    on_signals(leave_at_once)  # a container's first process ignores signals without handlers
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # take those that came while it executed itself anew
    options, training = parser.parse_known_args(arguments)
    try:
        code, reason = _launch(options, training, environ), ""
    except (PeerLost, Unavailable, InputError) as error:
        code = error.code
        reason = {FAILED: "failed: ", BAD_INPUT: "error: "}.get(code, "") + str(error)
    on_signals(signal.SIG_IGN)  # they have no effect from now on
    if reason:
        say(reason)
    return code


def _between(least: float, most: float, kind: type[float] = float) -> Callable[[str], float]:
    """A converter of an option's text with bounds, for argparse."""

    def number(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{value}: it must lie between {least} and {most}")
        return value

    return number


def _launch(options: argparse.Namespace, training: Sequence[str], environ: Mapping[str, str]) -> int:
    from naign.config import parse
    from naign.distributed.host import count_gpus
    from naign.storage.store import use_endpoint

    around = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [*os.environ]:
        if name in around or name.startswith(("ACCELERATE_USE_", "FSDP_")):  # of a launcher around this one
            del os.environ[name]
    settings = [] if training[:1] and training[0] in AUDITS else list(training)
    config = parse(settings)  # so that one process reports a mistake at once
    use_endpoint(config.data.endpoint)
    place = find_place(os.environ)
    processes = options.processes or place.processes or count_gpus() or 1
    links, engine = _meet_others(options, config, place, processes)
    if links is None:
        return 0
    os.environ["NAIGN_LAUNCHER"] = str(os.getpid())  # so that ranks end with this process
    if place.hosts * processes == 1 and not options.engine and not options.metrics:
        become_rank(config.train.precision, training)
    os.environ["PET_SHUTDOWN_TIMEOUT"] = str(math.ceil(config.stop.within) + 5)  # seconds until torchrun kills ranks
    os.environ["PET_RDZV_ID"] = f"{place.start}.{links.generation}"  # agents of different generations never meet
    ending, begun = Ending(patience=config.stop.within + 30, alone=place.hosts == 1), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if place.is_replaced:
            ending.stay = partial(meet_again, environ, PEER_LOST, ending, links, seconds=0)
        links.watch(ending.note)
        if options.metrics and settings == training:  # no audit
            options.server.watch(Path(scratch) / "heartbeat", links.generation)
        file = Path(scratch) / "engine.yaml"
        file.write_text(engine)
        code = run_ranks(file, place, processes, links.address, options.port, training, ending)
    seconds = time.monotonic() - begun
    if code == PEER_LOST:
        links.leave(code, lost=ending.lost)  # before waiting for the code of a host that may wait for this one's
    code = ending.judge(code)
    if code == 0 and config.run.remote and place.index == 0:
        on_signals(leave_at_once)
        if ending.asked:
            leave_at_once()
        if not _is_done(config, options.reach):
            code = FAILED
            say(f"the run is done, but {config.run.remote} does not hold its end: start again to send it once more")
    links.leave(code, lost=ending.lost or ending.killed)
    if code == 0 and config.run.remote and place.index:
        ending.wait_for(lambda: 0 in ending.codes, options.reach + 60)
        if ending.codes.get(0) != 0:
            code = INTERRUPTED if ending.asked else PEER_LOST
    _send_collectives(Path(config.run.path), config.run.remote)
    if place.is_replaced and ending.may_go_on(code):
        return meet_again(environ, code, ending, links, seconds)
    return code


def _meet_others(options: argparse.Namespace, config: Any, place: Place, processes: int) -> tuple[Links | None, str]:
    """Connections to the other hosts once all are there, and the engine's configuration; None if the run is done."""
    listener = listen(options.meeting_port) if place.hosts > 1 and place.index == 0 else None
    with listener or contextlib.nullcontext():
        try:
            if options.metrics:
                from naign.cluster.metrics import Metrics

                options.server = Metrics(options.metrics, place.index)
            engine = find_engine(options.engine, config.train.precision, place.hosts * processes)
            if require_gpus(options.gpus, processes, engine) and place.hosts * processes > 1:
                _record_collectives(Path(config.run.path))
            if _is_done(config, options.reach):
                say(f"nothing left to do: the run in {config.run.remote} is done")
                return None, ""
            if place.hosts > 1:
                say(f"host {place.index} of {place.hosts}, {processes} ranks each, under {place.orchestrator}")
                if listener:
                    listen(options.port, "--port").close()
                load_launcher()  # imported, which takes a second, while the others are awaited
            links = meet(place, listener, port=options.meeting_port, within=options.wait)
        except InputError as error:
            if listener:  # host 0: the others end for the same reason
                on_signals(lambda *_: os._exit(BAD_INPUT))
                say(f"telling the other hosts, for {TELLING:.0f} s at most: {error}")
                reject_all(listener, place, error)
            raise
    if place.hosts > 1:
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := links.interface()):
            os.environ["GLOO_SOCKET_IFNAME"] = name  # else gloo uses the address of the host's name, often 127.0.1.1
        say(f"all hosts are here; host 0 is {links.address}")
        check_progress(links)
    return links, engine


def _record_collectives(run: Path) -> None:
    """Have torch write each rank's newest collectives to nccl/rank_N in `run` if NCCL hangs, or as the user set it."""
    known = os.environ.get  # also by older names: torch/csrc/distributed/c10d/FlightRecorder.hpp
    files = known("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{run.absolute()}/nccl/rank_")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", files)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", known("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def _send_collectives(run: Path, remote: str) -> None:
    """Copy what ranks left in nccl/ to the run's bucket, if there is one: a pod's disk is lost with it."""
    from naign.storage.store import open_store

    try:
        for file in run.glob("nccl/*") if remote else ():
            open_store(f"{remote}/nccl").put(file.name, file.read_bytes())
    except (InputError, Unavailable, OSError) as error:
        say(f"{run}/nccl is not copied to {remote}: {error}")


def _is_done(config: Any, within: float) -> bool:
    """Whether the bucket holds the finished run. Raises InputError or Unavailable after `within` seconds."""
    from naign.training.run_folder import is_done

    end = time.monotonic() + within  # the bucket's server may still be starting
    while config.run.remote:
        try:
            return is_done(config)
        except Unavailable as error:
            reason = str(error).partition(". Check ")[0]
            if time.monotonic() > end:
                kind = Unavailable if "NAIGN_GENERATION" in os.environ else InputError  # it was reached before
                problem = f"run.remote cannot be reached: {reason}"
                raise kind(f"{problem}; check its name and AWS_ENDPOINT_URL") from None
            say(f"waiting for {config.run.remote}: {reason}")
    return False
