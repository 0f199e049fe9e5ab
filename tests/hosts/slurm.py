"""Slurm of two nodes on this machine: Debian's slurmctld, slurmd and munged, with a folder and ports of their own."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT, environment
from tests.programs import execute, succeeded
from tests.servers import free_port

CONF = """
ClusterName=naign
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=60
KillWait=30
MessageTimeout=60
BatchStartTimeout=120
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=1000
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def possible():
    """Why there can be no Slurm here, or ''."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root can start Slurm"
    for name in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(name):
            return f"no {name} here (Debian: slurm-wlm, munge)"
    return ""


class Slurm:
    """A context manager: the daemons run inside it."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # its sockets' names may not be long
        self.folder.chmod(0o755)
        self.environment = environment(SLURM_CONF=str(self.folder / "slurm.conf"))
        self._daemons = []

    def __enter__(self):
        (self.folder / "state").mkdir()
        first = free_port(beside=1)
        names = {"host": socket.gethostname(), "folder": self.folder, "port": free_port()}
        (self.folder / "slurm.conf").write_text(CONF.format(first=first, last=first + 1, **names))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        kinds = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
        files = [f"--{name}={self.folder}/munge.{end}" for name, end in kinds.items()]
        self._start("munged --foreground --force", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._start(f"slurmctld -D -i -f {self.folder}/slurm.conf")
        for node in ("node1", "node2"):
            (self.folder / f"spool-{node}").mkdir()
            self._start(f"slurmd -D -N {node} -f {self.folder}/slurm.conf")
        self._wait(lambda: self.ask("sinfo -h -o '%T %D'").strip() == "idle 2")
        return self

    def __exit__(self, *_):
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, line, *more):
        command = [*line.split(), *more]
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _wait(self, met, seconds=30):
        end = time.monotonic() + seconds
        while not met():
            logs = {file.name: file.read_text(errors="replace")[-1500:] for file in self.folder.glob("*.*log*")}
            assert time.monotonic() < end, f"{logs} {[file.read_text() for file in self.folder.glob('*.out')]}"
            time.sleep(0.1)

    def ask(self, line):
        return execute(shlex.split(line), env=self.environment).stdout

    def submit(self, place, *options):
        """Queue launch/slurm.sbatch; the job's number."""
        # Both nodes are this machine, and no name server knows them.
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NAIGN_HEAD": "127.0.0.1"}
        done = succeeded(
            execute(
                ["sbatch", "--parsable", str(ROOT / "launch/slurm.sbatch"), *options],
                place,
                env=self.environment | path,
            )
        )
        return done.stdout.strip()

    def state(self, job):
        """PENDING, RUNNING, COMPLETED, FAILED, ... and its exit code."""
        shown = self.ask(f"scontrol --oneliner show job {job}")
        found = dict(part.split("=", 1) for part in shown.split() if "=" in part)
        return f"{found.get('JobState', 'none')} {found.get('ExitCode', '')}"
