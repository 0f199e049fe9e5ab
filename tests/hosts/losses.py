"""The losses that a pod can suffer, and how long a Job takes to train again."""

import contextlib
import copy
import json
import operator
import signal
import time
from dataclasses import dataclass

import psutil
import yaml

from tests.hosts.cluster import manifest

KINDS = ("delete", "rank", "launcher", "node")
"""The pod is deleted; SIGKILL for its rank, as when memory is out; SIGKILL for all of it; its node vanishes."""


SMOKE = {
    "data": {"path": "s3://naign/digits", "source": "digits"},
    "run": {"path": "/run/naign/digits", "remote": "s3://naign/runs/digits"},
    "model": {"width": 16, "code": 32},
    "prior": {"name": "none"},
    "match": {"round": 1024, "ratio": 4.0},
    "train": {"batch": 64, "timeout": 120, "threads": 1},
    "checkpoint": {"rounds": 5},
    "report": {"pictures": 100},
    "stop": {"within": 60},
}
"""A run on digits of 8 x 8."""


def prepared(hosts, *, rounds=24, **train):
    """The manifest for so many pods, with a run that ends in a minute."""
    objects = manifest("job.yaml")
    for item in objects:
        if item["kind"] == "ConfigMap" and "run.yaml" in item["data"]:
            config = copy.deepcopy(SMOKE)
            config["train"] |= {"images": rounds * 1024, **train}
            item["data"]["run.yaml"] = yaml.safe_dump(config)
        if item["kind"] == "Job":
            item["spec"] |= {"completions": hosts, "parallelism": hosts}
            for variable in item["spec"]["template"]["spec"]["containers"][0]["env"]:
                if variable["name"] == "NAIGN_HOSTS":
                    variable["value"] = str(hosts)
    return objects


def reported(pod):
    """The rounds that host 0 has reported, by its own files."""
    found = []
    if pod is None:
        return found
    metrics = pod.log.parent / "volumes/run/digits/metrics.jsonl"
    if not metrics.exists():
        return found
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(ValueError):  # that is being written
            found.append(json.loads(line))
    return found


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds from a loss until ..."""

    noticed: float
    """all other hosts have ended their ranks"""
    replaced: float
    """the controller starts a new pod"""
    met: float
    """all hosts are there"""
    trained: float
    """the next round is reported"""


def kill_rank(pod):
    """SIGKILL for the pod's rank, if that runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pod.process.pid).children(recursive=True):
            if any(word.endswith("train.py") for word in process.cmdline()):
                process.kill()


def lose(job, index, kind):
    pod = job.pods[index]
    job.cluster.tell(f"{kind}: {pod.name}")
    if kind == "node":
        job.take_node(index)
    elif kind == "rank":
        kill_rank(pod)
    else:
        pod.kill(signal.SIGTERM if kind == "delete" else signal.SIGKILL)


def recover(job, index, kind, within):
    """Lose a pod and wait until the Job trains again; AssertionError where another pod ends, or it takes too long."""
    lost = job.pods[index]
    others = [pod for pod in job.pods.values() if pod is not lost]

    def stays():
        return [pod.output().count("this host stays") for pod in others]

    stayed = stays()
    met = 0
    if index:
        met = job.pods[0].output().count("hosts are here")
    begun = time.monotonic()
    seconds = []

    def reached(condition):
        job.until(condition, within + begun - time.monotonic())
        seconds.append(time.monotonic() - begun)
        for pod in others:
            assert pod.code is None, [*job.cluster.events, pod.output()]

    lose(job, index, kind)
    reached(lambda: all(map(operator.gt, stays(), stayed)))
    reached(lambda: job.pods.get(index, lost) is not lost)
    reached(lambda: job.pods[0].output().count("hosts are here") > met)
    now = time.time()
    reached(lambda: any(line["time"] > now for line in reported(job.pods.get(0))))
    job.cluster.tell(f"trains again: {[round(value, 1) for value in seconds]}")
    return Recovery(*seconds)
