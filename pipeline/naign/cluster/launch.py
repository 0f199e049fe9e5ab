"""`naign launch [options] [--config FILE] [--section.key=value ...]`: start this host's ranks of a training; or those
of an audit: `naign launch [options] copies RUN ...`.

The same command runs on a single machine and on every host of a Kubernetes Job or JobSet, or a Slurm step. It waits for
all hosts of this start, then starts the ranks, which connect through Accelerate. Where a lost host is replaced, this
one ends its ranks and meets the others again. Exit codes: 0 done, 2 bad configuration or input,
75 stopped after a checkpoint, 76 another host is lost, any other a crash (docs/training.md).
"""

import argparse
import asyncio
import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from naign.cluster.place import RANKS, Place, find_place, find_port
from naign.cluster.ranks import AUDIT, MEANINGS, Ranks, become_rank, check_shares, find_engine, require_gpus
from naign.cluster.rejoin import SETTLED, Hosts, Links, program, say
from naign.errors import InputError, Outcome, PeerLost, Unavailable
from naign.process import on_signals
from naign.terminal import outlive_terminal

REACH = 300.0  # seconds to wait for the bucket of run.remote


def build_parser() -> argparse.ArgumentParser:
    """The parser of the launcher's options; all others are settings of the training."""
    parser = argparse.ArgumentParser(
        program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    count = _between(0, RANKS, int)
    port = _between(1, 65535, int)
    engine = "a configuration of Accelerate: a file, or a name in launch/, such as zero2; default: DDP, on GPUs if any"
    parser.add_argument("--engine", default="", help=engine)
    parser.add_argument("--processes", type=count, default=0, help="ranks on this host; default: one per GPU, or one")
    parser.add_argument("--gpus", type=count, default=0, help="GPUs that this host must have; default: any number")
    parser.add_argument(
        "--port", type=port, default=find_port(os.environ), help="port where host 0 meets the others (%(default)s)"
    )
    parser.add_argument("--metrics", type=port, default=0, help="port of this host for /metrics; default: none")
    wait = "seconds to wait for the other hosts (%(default)s)"
    parser.add_argument("--wait", type=_between(1, 10**6, float), default=900, help=wait)
    return parser


def _between(least: float, most: float, kind: type[float]) -> Callable[[str], float]:
    """A converter of an option's text with bounds, for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value}: it must lie between {least} and {most}")
        return value

    return number


class Asked:
    """The handler of all signals: without ranks this process ends at once, else their loop passes the first one on."""

    def __init__(self) -> None:
        self.number = 0
        self.at_once = True

    def __call__(self, number: int, _: object = None) -> None:
        self.number = self.number or number
        if self.at_once:
            say(MEANINGS[Outcome.INTERRUPTED])
            os._exit(Outcome.INTERRUPTED)

    def __bool__(self) -> bool:
        return self.number != 0


def main(arguments: Sequence[str]) -> int:
    """Start the ranks and wait for them. Returns the exit code; InputError, PeerLost and Unavailable are logged."""
    outlive_terminal()
    asked = Asked()
    on_signals(asked)  # a container's first process ignores signals without handlers
    options, training = build_parser().parse_known_args(arguments)
    try:
        return asyncio.run(_launch(options, training, asked))
    except (PeerLost, Unavailable, InputError) as error:
        say(f"{error.kind}{error}")
        return error.code
    finally:
        on_signals(signal.SIG_IGN)  # they have no effect from now on


async def _launch(options: argparse.Namespace, training: Sequence[str], asked: Asked) -> int:
    from naign.config import parse
    from naign.distributed.host import count_gpus

    around = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [*os.environ]:
        if name in around or name.startswith(("ACCELERATE_USE_", "FSDP_")):  # of a launcher around this one
            del os.environ[name]
    settings = [] if training[:1] == [AUDIT] else list(training)
    config = parse(settings)  # so that one process reports a mistake at once
    gc.enable()  # disabled for the imports
    place = find_place(os.environ)
    processes = options.processes or place.processes or count_gpus() or 1
    engine = find_engine(options.engine, config.train.precision, place.hosts * processes)
    wanted = options.gpus
    if place.orchestrator == "Slurm" and not options.engine:
        wanted = wanted or place.processes  # the GPUs of this node that are the job's
    require_gpus(wanted, processes, engine)
    if place.is_elastic and training[:1] != [AUDIT]:
        check_shares(config, place.least, place.hosts, processes)
    if _is_done(config, place):
        say(f"nothing left to do: the run in {config.run.remote or config.run.path} is done")
        return Outcome.DONE
    if options.metrics:
        os.environ["NAIGN_METRICS"] = str(options.metrics)  # observe/metrics.py
    if place.hosts * processes == 1 and not options.engine:
        become_rank(engine, training)
    if place.hosts > 1:
        say(f"host {place.index} of {place.hosts}, {processes} ranks each, under {place.orchestrator}")
    async with Hosts(place, port=options.port, ranks=processes, within=options.wait) as hosts:
        while True:
            asked.at_once = True
            links = await hosts.meet()
            if place.hosts > 1:
                say(f"{links.hosts} of {place.hosts} hosts are here; host 0 is {links.address}")
            asked.at_once = False
            begun = time.monotonic()
            with (
                TemporaryDirectory() as scratch,
                Ranks(
                    training,
                    engine,
                    links,
                    folder=Path(scratch),
                    count=processes,
                    within=config.stop.within,
                ) as ranks,
            ):
                code, killed = await _watch(ranks, links, hosts, asked)
            if code == Outcome.PEER_LOST:
                links.leave(code, lost=links.lost)  # before waiting for the code of a host that may wait for this one's
            code = await links.judge(code, killed=killed, asked=asked)
            links.leave(code, lost=links.lost or killed)
            # Only Kubernetes replaces a host that is lost while the others stay.
            if asked or place.orchestrator != "Kubernetes" or not links.may_meet_again(code):
                return code
            links.close()
            hosts.note_training(
                links,
                time.monotonic() - begun,
                timeout=config.train.timeout,
                stopped=code == Outcome.INTERRUPTED,
            )
            say(f"this host stays, and waits for the others to meet again (they have met {links.generation} times)")


async def _watch(ranks: Ranks, links: Links, hosts: Hosts, asked: Asked) -> tuple[int, bool]:
    """Wait for the ranks, pass a signal on to them, and end them where another host has ended or come. Returns the exit
    code, and whether a rank was killed from outside.
    """
    is_stopping = False
    begun = time.monotonic()
    while ranks.running():
        if asked and not is_stopping:
            ranks.stop(asked.number)
            is_stopping = True
        is_due = hosts.newcomer and time.monotonic() > begun + SETTLED * hosts.within
        if is_due and not is_stopping:
            say("another host has come: the ranks write a checkpoint, and all meet again")
        if (is_due or links.codes.get(0) == Outcome.INTERRUPTED) and not is_stopping:
            ranks.ask()
            is_stopping = True
        if links.time_left(ranks.within + 30) < 0:
            say("this host's ranks do not end: killed")
            ranks.kill()
            links.lost = True
            return Outcome.PEER_LOST, False
        await asyncio.sleep(0.1)
    code, reason, killed = ranks.outcome()
    links.is_cause = killed or code == Outcome.BAD_INPUT
    if reason:
        say(reason)
    return code, killed


def _is_done(config: Any, place: Place) -> bool:
    """Whether the run is finished: in its bucket or, for one of several hosts, in the folder that they share.

    Raises Unavailable where the bucket does not answer for REACH seconds; its server may still be starting.
    """
    from naign.storage.retry import give_up_after
    from naign.training.run_folder import is_done

    kept = config.run.remote
    if not kept and place.hosts > 1:
        kept = str(Path(config.run.path).absolute())  # shared, or its ranks are refused
    if not kept:
        return False
    try:
        with give_up_after(REACH):
            return is_done(config, kept)
    except Unavailable as error:
        raise Unavailable(f"run.remote cannot be reached: {error}") from None
