"""Commands that train, on this machine or on many, and check a machine: train, launch, render, fetch, doctor."""

import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm
from tyro.conf import Positional

from naign.cluster.job import Job
from naign.errors import InputError, Unavailable, require
from naign.terminal import busy

ABOUT_TRAIN = """Train a network. Options besides the settings below:
--config FILE: a YAML file, or the name of one in configs/, such as digits. Settings on the command line override it.
--engine FILE: a configuration of Accelerate, or the name of one in launch/, such as zero2. Default: DDP.
--processes N: ranks on this machine. Default: one for each GPU, or one.
All options of `naign launch` (naign launch --help), for several machines."""


def train() -> None:
    """Train a network; naign train --help lists all settings. Takes the options of naign launch, too."""
    if not {"-h", "--help"}.isdisjoint(sys.argv[2:]):
        from naign.config import parse

        parse(sys.argv[2:], about=ABOUT_TRAIN)
    launch()


def launch() -> None:
    """Start the ranks of this host, under Kubernetes, Slurm or alone; naign launch --help lists options."""
    gc.disable()  # while modules are imported; see pipeline/train.py
    from naign.cluster.launch import build_parser, main

    if not {"-h", "--help"}.isdisjoint(sys.argv[2:]):
        print(build_parser().format_help(), end="")  # argparse itself would ignore a full disk
        return
    code = main(sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would restore the default signal handlers and join threads


def render(
    what: Positional[Literal["k8s"]],
    /,
    *,
    job: Annotated[Job, tyro.conf.arg(name="")],
) -> None:
    """Print the manifests of a training. For Slurm submit launch/slurm.sbatch, whose head has the options.

    Args:
        what: k8s, for kubectl apply -f -.
    """
    from naign.cluster.render import render_k8s

    print(render_k8s(job))
    if not job.endpoint and "AWS_ENDPOINT_URL" in os.environ:
        print("AWS_ENDPOINT_URL is set here and not in the manifests: give --endpoint", file=sys.stderr)


def fetch(
    remote: Positional[str],
    /,
    *,
    to: Path,
    every: float = 0,
) -> None:
    """Copy what a run in a bucket reports (settings, metrics, TensorBoard, pictures) into a folder.

    Args:
        remote: s3://bucket/prefix of the run.
        to: Folder to copy into.
        every: Seconds between copies; 0 copies once.
    """
    import time

    from naign.checkpoint.bucket import fetch_shown
    from naign.storage.store import open_store

    require(
        (every == 0 or 1 <= every <= 86400, f"--every is {every:g}: it must be 0, or 1 to 86400 seconds"),
        (str(to) not in ("", "."), "--to is the current folder: name another one"),
        (every or open_store(remote).exists("config.yaml"), f"{remote} holds no run: its config.yaml is not there"),
    )
    while True:
        try:
            with busy(f"fetching {remote}"):
                count = fetch_shown(remote, to)
            print(f"{count} files from {remote}", flush=True)
        except (InputError, Unavailable) as error:
            if not every:
                raise
            print(f"naign fetch: {error}", file=sys.stderr, flush=True)
        if not every:
            return
        time.sleep(every)


def doctor() -> None:
    """Check this machine: versions, devices, FAISS, disk."""
    from naign.observe.doctor import examine

    wrong = []
    with busy("examining this machine"):
        for text, remedy in examine():
            tqdm.write(text)  # a line above the progress
            if remedy:
                wrong.append(f"{text}: {remedy}")
    if wrong:
        raise InputError("\n  ".join(["this machine is not ready:", *wrong]))
    print("ready")
