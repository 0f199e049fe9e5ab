"""A Job that loses a pod trains again 14 s later with two hosts, and 22 s later with eight.

    python benchmarks/lost_hosts.py --to benchmarks/results/lost_hosts

k8s/job.yaml trains on the digits in network namespaces of this machine (as root; tests/hosts/cluster.py), whose
controller replaces a pod after 10 s x 2^(n-1) as the real one does. Each row is a Job that loses three pods in turn, in
one of four ways. The table has the seconds since the loss until all other hosts have ended their ranks, until the
controller starts the new pod, until all hosts are there, and until the next round is reported; beside them those of the
first start, and the load of this machine, whose cores all pods share. Rows that were measured already are kept.
"""

import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from output import ROOT, Record, page, stored, write

from naign.errors import InputError, exit_on_input_error

sys.path.insert(0, str(ROOT))

from tests.hosts.cluster import Cluster, Job, possible  # noqa: E402
from tests.hosts.losses import KINDS, prepared, recover, reported  # noqa: E402

TITLES = [
    "hosts",
    "loss",
    "of pod",
    "load",
    "first start",
    "noticed",
    "replaced",
    "all there",
    "trains",
]
MEANINGS = ("pod deleted", "rank killed (SIGKILL)", "launcher killed (SIGKILL)", "node gone")
"""Of KINDS."""


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure losses of hosts."""

    hosts: tuple[int, ...] = (2, 4, 8)
    """Pods of a Job."""
    kinds: tuple[str, ...] = KINDS
    """How a pod is lost."""
    within: float = 300.0
    """Seconds that a Job may take to train again."""
    to: Path = Path("benchmarks/results/lost_hosts")
    """Where to write, without an ending."""


def main(settings: Settings) -> None:
    found = stored(settings.to, dict)
    why = possible()
    if why:
        raise InputError(f"several hosts cannot be made here: {why}")
    few = min(settings.hosts, default=0) < 2
    if set(settings.kinds) - set(KINDS) or few or max(settings.hosts) > 64:
        raise InputError(f"--kinds must be some of {', '.join(KINDS)}, and --hosts 2 to 64")
    for hosts in settings.hosts:
        for kind in settings.kinds:
            name = f"{hosts} {kind}"
            if name not in found:
                found[name] = measure(hosts, kind, settings)
                text = page("Losses of pods, seconds until the Job trains again", TITLES, rows(found))
                write(settings.to, text, found)
    print(page("Losses of pods, seconds until the Job trains again", TITLES, rows(found)))


def measure(hosts: int, kind: str, settings: Settings) -> Record:
    """A Job's first start, in seconds, and its recoveries from three losses."""
    lost = [hosts - 1, 0, 1]
    recoveries = []
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        Path(folder).chmod(0o755)  # pods are other users
        with Cluster(Path(folder) / "cluster", prepared(hosts, rounds=10_000)) as cluster:
            cluster.serve("naign-store")
            job = Job(cluster, "naign", backoff=10.0)
            begun = time.monotonic()
            for number in range(hosts):
                job.create(number)
            wait_for_rounds(job, 1, settings.within)
            first = time.monotonic() - begun
            for number in lost:
                done = len(reported(job.pods[0]))
                wait_for_rounds(job, done + 6, settings.within)
                recovery = asdict(recover(job, number, kind, settings.within))
                recoveries.append({"pod": number, **recovery})
                print(f"{hosts} hosts, {kind}: {recoveries[-1]}", flush=True)
    return {
        "first": first,
        "load": os.getloadavg()[1],
        "cores": os.cpu_count(),
        "losses": recoveries,
    }


def wait_for_rounds(job: Job, rounds: int, within: float) -> None:
    """Until so many rounds are reported."""
    job.until(lambda: len(reported(job.pods[0])) >= rounds, within)


def rows(found: dict[str, Record]) -> list[list[str]]:
    lines = []
    for name in sorted(found, key=lambda name: int(name.split()[0])):
        row = found[name]
        hosts, kind = name.split()
        meaning = MEANINGS[KINDS.index(kind)]
        load = f"{row['load']:.0f} on {row['cores']} cores"
        for loss in row["losses"]:
            cells = [hosts, meaning, str(loss["pod"]), load, f"{row['first']:.1f}"]
            cells += [f"{loss[key]:.1f}" for key in ("noticed", "replaced", "met", "trained")]
            lines.append(cells)
    return lines


if __name__ == "__main__":
    with exit_on_input_error("lost_hosts"):
        main(tyro.cli(Settings))
