"""This host's place in its job, from the variables that Kubernetes or Slurm set."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from naign.errors import InputError

MOST = 99_999  # largest index, number of hosts and generation: `_number` reads five digits
RANKS = 1024  # on a host
PORT = 29400  # default port where host 0 meets the others


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A host of a job: a pod, a node of an allocation, or this machine alone."""

    orchestrator: str
    index: int = 0
    hosts: int = 1  # at most
    least: int = 0  # with which training begins, and goes on where a lost host is not replaced; 0: all
    head: str = "localhost"  # name or address of host 0, as the others reach it
    start: str = ""  # id of this start of the job: hosts of an earlier one may still be running
    processes: int = 0  # ranks on this host; 0: one a GPU, or one

    @property
    def is_elastic(self) -> bool:
        return 0 < self.least < self.hosts


def find_place(environ: Mapping[str, str]) -> Place:
    """This host's place, from the first orchestrator whose variables are set.

    - Kubernetes: an Indexed Job's JOB_COMPLETION_INDEX, beside NAIGN_HOSTS, NAIGN_HEAD (the name of the first pod) and
      NAIGN_START (the Job's uid), which the manifests in k8s/ set.
    - Slurm: one task of `srun` a node, and NAIGN_HEAD, which launch/slurm.sbatch sets. A batch script that calls no
      srun is alone, on its one node.

    Without any of them the host is alone. Raises InputError where variables are missing or contradictory.
    """
    if "NAIGN_HOSTS" in environ:
        least, hosts = read_hosts("the variable NAIGN_HOSTS", _text(environ, "NAIGN_HOSTS"))
        place = Place(
            orchestrator="Kubernetes",
            index=_number(environ, "JOB_COMPLETION_INDEX"),
            hosts=hosts,
            least=least,
            head=_text(environ, "NAIGN_HEAD"),
            start=environ.get("NAIGN_START", ""),
        )
    elif "SLURM_PROCID" in environ:
        place = _of_slurm(environ)
    elif "JOB_COMPLETION_INDEX" in environ:
        remedy = "say how many pods train together, or 1 if each trains alone in a --run.path of its own"
        raise InputError(f"this is a pod of an Indexed Job, but NAIGN_HOSTS is not set: {remedy}")
    else:
        return Place(orchestrator="none")
    labels = place.head.rstrip(".").split(".")
    if not all(re.fullmatch(r"[\w:-]{1,63}", label, re.ASCII) for label in labels):
        raise InputError(f"'{place.head[:300]}' is not a name of a host: see NAIGN_HEAD in k8s/job.yaml")
    if not place.index < place.hosts:
        raise InputError(
            f"{place.orchestrator} says that this is host {place.index} of {place.hosts}, counted from 0: "
            "make NAIGN_HOSTS, or completions and parallelism of the Job, the number of hosts everywhere"
        )
    return place


def read_hosts(what: str, text: str) -> tuple[int, int]:
    """The least and the most hosts of '4', or of '2:4'. Raises InputError, which names `what` says so."""
    least, colon, most = text.partition(":")
    numbers = [_read_number(what, part) for part in (least, most or least)]
    if colon and not 2 <= numbers[0] < numbers[1]:
        raise InputError(f"{what} is {text}: give a number of hosts, or the least, 2 or more, and the most, as 2:4")
    return numbers[0], numbers[1]


def _of_slurm(environ: Mapping[str, str]) -> Place:
    hosts = _number(environ, "SLURM_NNODES", default="1")
    if "SLURM_STEP_ID" not in environ:  # the batch script itself
        if hosts > 1:
            raise InputError(f"this job has {hosts} nodes: start training with srun, as launch/slurm.sbatch does")
        return Place(orchestrator="none")
    tasks = environ.get("SLURM_NTASKS")
    if tasks != str(hosts):
        wanted = "one a node is wanted (--ntasks-per-node=1), which starts that node's ranks"
        raise InputError(f"srun started {tasks} tasks on {hosts} nodes: {wanted}")
    parts = (
        environ.get("SLURM_JOB_ID", ""),
        environ.get("SLURM_RESTART_COUNT", "0"),
        environ["SLURM_STEP_ID"],
    )
    return Place(
        orchestrator="Slurm",
        index=_number(environ, "SLURM_PROCID"),
        hosts=hosts,
        head=_text(environ, "NAIGN_HEAD", default="localhost" if hosts == 1 else ""),
        start=".".join(parts),
        processes=_number(environ, "SLURM_GPUS_ON_NODE", default="0"),
    )


def find_port(environ: Mapping[str, str]) -> int:
    """PORT; on Slurm, where jobs share nodes, one derived from the job id, below the ephemeral ports (32768)."""
    job = environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return PORT
    return 20_000 + int(job[-9:]) % 12_000


def _text(environ: Mapping[str, str], name: str, default: str = "") -> str:
    text = environ.get(name, "").strip() or default
    if not text:
        raise InputError(
            f"the variable {name} is not set, which says where this host stands: see k8s/job.yaml, launch/slurm.sbatch"
        )
    return text


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    return _read_number(f"the variable {name}", _text(environ, name, default))


def _read_number(what: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text):
        raise InputError(f"{what} is '{text[:40]}': it must be a number from 0 to 99999")
    return int(text)
