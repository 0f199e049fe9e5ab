"""This host's place in its job, from the variables that Kubernetes, Kubeflow or Slurm set."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from naign.errors import InputError, one_line, require

MOST = 99_999  # largest index, number of hosts and generation: `_number` reads five digits
RANKS = 1024  # on a host
PORTS = (29400, 29500)  # default ports of host 0: where hosts wait for each other, and the rendezvous of the ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A host of a job: a pod, a node of an allocation, or this machine alone."""

    orchestrator: str
    index: int = 0
    hosts: int = 1
    head: str = "localhost"  # name or address of host 0, as the others reach it
    start: str = ""  # id of this start of the job: hosts of an earlier one may still be running
    processes: int = 0  # ranks on this host; 0: one a GPU, or one
    generation: int = 0  # of the last meeting of this start that this host took part in
    since: int = 0  # the generation since which the hosts are the same and none trained for long

    @property
    def is_replaced(self) -> bool:
        """Whether the orchestrator replaces a host that is lost while the others stay."""
        return self.orchestrator in ("Kubernetes", "Kubeflow")


def find_place(environ: Mapping[str, str]) -> Place:
    """This host's place, from the first orchestrator whose variables are set.

    - Kubernetes: an Indexed Job's JOB_COMPLETION_INDEX, beside NAIGN_HOSTS, NAIGN_HEAD (the name of the first pod) and
      NAIGN_START (the Job's uid), which k8s/job.yaml sets.
    - Kubeflow Trainer v2, or whoever sets torchrun's options: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR.
    - Slurm: one task of `srun` a node. A batch script that calls no srun is alone, on its one node.

    Without any of them the host is alone. A host that meets the others again (meeting.py) sets NAIGN_GENERATION and
    NAIGN_SINCE itself. Raises InputError where variables are missing or contradictory.
    """
    generation, since = (_number(environ, name, default=0) for name in ("NAIGN_GENERATION", "NAIGN_SINCE"))
    processes, start = 0, environ.get("NAIGN_START", "")
    if "NAIGN_HOSTS" in environ:
        name, index, hosts = "Kubernetes", _number(environ, "JOB_COMPLETION_INDEX"), _number(environ, "NAIGN_HOSTS")
        head = _text(environ, "NAIGN_HEAD")
    elif "PET_NNODES" in environ:
        name, hosts, per_node = "Kubeflow", _number(environ, "PET_NNODES"), environ.get("PET_NPROC_PER_NODE", "auto")
        index = _number(environ, "PET_NODE_RANK", default=0 if hosts == 1 else None)
        head = environ.get("PET_MASTER_ADDR", "localhost")
        processes = _number(environ, "PET_NPROC_PER_NODE") if per_node.isdecimal() else 0
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" not in environ:  # the batch script itself
        hosts = _number(environ, "SLURM_NNODES", default=1)
        require((hosts == 1, f"this job has {hosts} nodes: start training with srun, as launch/slurm.sbatch does"))
        return Place(orchestrator="none")
    elif "SLURM_PROCID" in environ:
        tasks, nodes = environ.get("SLURM_NTASKS"), environ.get("SLURM_NNODES")
        wanted = "one a node is wanted (--ntasks-per-node=1), which starts that node's ranks"
        require((tasks == nodes, f"srun started {tasks} tasks on {nodes} nodes: {wanted}"))
        name, index, hosts = "Slurm", _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NNODES")
        head = environ.get("NAIGN_HEAD") or _first_node(_text(environ, "SLURM_JOB_NODELIST"))
        parts = {"SLURM_JOB_ID": "", "SLURM_RESTART_COUNT": "0", "SLURM_STEP_ID": "0"}
        start = ".".join(environ.get(variable, default) for variable, default in parts.items())
    elif "JOB_COMPLETION_INDEX" in environ:
        remedy = "say how many pods train together, or 1 if each trains alone in a --run.path of its own"
        raise InputError(f"this is a pod of an Indexed Job, but NAIGN_HOSTS is not set: {remedy}")
    else:
        return Place(orchestrator="none")
    named = all(re.fullmatch(r"[\w:-]{1,63}", label, re.ASCII) for label in head.rstrip(".").split("."))
    remedy = "make NAIGN_HOSTS, or completions and parallelism of the Job, the number of hosts everywhere"
    require(
        (named, f"'{head[:300]}' is no name of a host: see NAIGN_HEAD in k8s/job.yaml"),
        (0 <= index < hosts, f"{name} says that this is host {index} of {hosts}, counted from 0: {remedy}"),
        (since <= generation, f"NAIGN_SINCE ({since}) is more than NAIGN_GENERATION ({generation}): set neither"),
        (processes <= RANKS, f"{processes} ranks on this host: at most {RANKS} are possible"),
    )
    met = {"generation": generation, "since": since}
    return Place(orchestrator=name, index=index, hosts=hosts, head=head, start=start, processes=processes, **met)


def find_ports(environ: Mapping[str, str]) -> tuple[int, int]:
    """PORTS; on Slurm, where jobs share nodes, two derived from the job id, below the ephemeral ports (32768)."""
    job = environ.get("SLURM_JOB_ID", "")
    return (first := 20_000 + int(job[-9:]) % 6000 * 2, first + 1) if job.isdecimal() else PORTS


def _first_node(nodes: str) -> str:
    """The first host of a Slurm node list such as 'node[03-17,20]'."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (FileNotFoundError, subprocess.CalledProcessError, IndexError) as error:
        reason = one_line(getattr(error, "stderr", "") or error)
        raise InputError(f"scontrol cannot name the nodes of '{nodes}' ({reason}): set NAIGN_HEAD") from None


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name, "").strip():
        raise InputError(f"the variable {name} is not set, which says where this host stands: see k8s/job.yaml")
    return environ[name].strip()


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    if default is not None and not environ.get(name, "").strip():
        return default
    text = _text(environ, name)
    if not text.isdecimal() or len(text) > 5:
        raise InputError(f"the variable {name} is '{text[:40]}': it must be a number from 0 to 99999")
    return int(text)
