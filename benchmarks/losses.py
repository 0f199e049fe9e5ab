"""How long does a Job of several pods take to train again when it loses one of them?

    python benchmarks/losses.py --to benchmarks/results/losses

k8s/job.yaml trains on the digits in network namespaces of this machine (as root; tests/hosts/cluster.py), whose
controller replaces a pod after 10 s x 2^(n-1) as the real one does. Each row is a Job that loses three pods, one after
the other, all in the same way. The table has the seconds since the loss until all other hosts have ended their ranks,
until the controller starts the new pod, until all hosts are there, and until the next round is reported; beside them
those of the first start, from its pods to its first round, and the load of this machine: all pods share its cores, and
starting a host takes them for seconds. What has been measured already is kept.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from trained import ROOT, check_place, page, write

from naign.errors import InputError, exit_on_input_error

sys.path.insert(0, str(ROOT))

from tests.hosts.cluster import Cluster, Job, possible  # noqa: E402
from tests.hosts.losses import KINDS, prepared, recover, reported  # noqa: E402

TITLES = ["hosts", "loss", "of pod", "load", "first start", "noticed", "replaced", "all there", "trains"]
MEANINGS = dict(
    zip(KINDS, ("pod deleted", "rank killed (SIGKILL)", "launcher killed (SIGKILL)", "node gone"), strict=True)
)


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure losses."""

    hosts: tuple[int, ...] = (2, 4, 8)
    """Pods of a Job."""
    kinds: tuple[str, ...] = KINDS
    """How a pod is lost."""
    backoff: float = 10.0
    """Seconds before the controller replaces a pod the first time."""
    within: float = 300.0
    """Seconds that a Job may take to train again."""
    to: Path = Path("benchmarks/results/losses")
    """Where to write, without an ending."""


def main(settings: Settings) -> None:
    check_place(settings.to)
    if why := possible():
        raise InputError(f"several hosts cannot be made here: {why}")
    if set(settings.kinds) - set(KINDS) or not all(2 <= hosts <= 64 for hosts in settings.hosts):
        raise InputError(f"--kinds must be some of {', '.join(KINDS)}, and --hosts 2 to 64")
    file = settings.to.with_suffix(".json")
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for hosts in settings.hosts:
        for kind in settings.kinds:
            if (name := f"{hosts} {kind}") not in found:
                found[name] = measure(hosts, kind, settings)
                write(
                    settings.to, page("Losses of pods, seconds until the Job trains again", TITLES, rows(found)), found
                )
    print(settings.to.with_suffix(".md").read_text())


def measure(hosts: int, kind: str, settings: Settings) -> dict[str, Any]:
    """A Job's first start, in seconds, and its recoveries from three losses."""
    lost = [hosts - 1, 0, min(1, hosts - 2) if hosts > 2 else 1]
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        Path(folder).chmod(0o755)  # pods are other users
        with Cluster(Path(folder) / "cluster", prepared(hosts, rounds=10_000)) as cluster:
            cluster.serve("naign-store")
            job = Job(cluster, "naign", backoff=settings.backoff)
            begun = time.monotonic()
            for index in range(hosts):
                job.create(index)
            job.until(lambda: bool(reported(job.pods[0])), settings.within)
            first, recoveries = time.monotonic() - begun, []
            for index in lost:
                before = len(reported(job.pods[0]))
                job.until(lambda: len(reported(job.pods[0])) > before + 5, settings.within)  # noqa: B023
                recoveries.append({"pod": index, **asdict(recover(job, index, kind, settings.within))})
                print(f"{hosts} hosts, {kind}: {recoveries[-1]}", flush=True)
    return {"first": first, "load": os.getloadavg()[1], "cores": os.cpu_count(), "losses": recoveries}


def rows(found: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name, row in sorted(found.items(), key=lambda item: int(item[0].split()[0])):
        hosts, kind = name.split()
        for loss in row["losses"]:
            times = (row["first"], *(loss[key] for key in ("noticed", "replaced", "met", "trained")))
            load = f"{row['load']:.0f} on {row['cores']} cores"
            lines.append([hosts, MEANINGS[kind], str(loss["pod"]), load, *(f"{value:.1f}" for value in times)])
    return lines


if __name__ == "__main__":
    with exit_on_input_error("losses"):
        main(tyro.cli(Settings))
