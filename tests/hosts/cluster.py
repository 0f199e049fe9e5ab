"""Several hosts on this machine, on which a manifest's pods run as a kubelet and the Job controller would run them.

Each pod is a process in namespaces of its own: network (an address on one bridge), mounts (the image's root, read-only,
and its volumes), processes (so that it is number 1, and its end is the end of all it started), name and user.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT, environment
from tests.programs import succeeded

_numbers = itertools.count()


def possible():
    """Why hosts cannot be made here, or ''."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root can make network namespaces"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "no `ip` or `unshare` here (Debian: iproute2, util-linux)"
    probe = f"naign-probe-{os.getpid()}"  # other workers of a test run ask at the same moment
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return tried.stderr.strip()


def run(line):
    succeeded(subprocess.run(line.split(), check=False, capture_output=True, text=True))


def inside(folder):
    """Whether an image would have to be given this folder: /usr is there."""
    return not folder.startswith("/usr/") and not (folder != str(ROOT) and Path(folder).is_relative_to(ROOT))


@dataclass(slots=True)
class Pod:
    """A pod under way, or ended."""

    name: str
    network: str
    link: str  # the bridge's end of its cable
    address: str
    log: Path
    process: subprocess.Popen[bytes]
    started: float

    @property
    def code(self):
        """As the runtime reports it: 128 and the signal for one that was killed."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def output(self):
        return self.log.read_text(errors="replace")

    def kill(self, number=signal.SIGKILL):
        """Send its first process a signal from outside, as a runtime does."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), number)


@dataclass(slots=True)
class Cluster:
    """A bridge, and pods of the objects in some manifest."""

    folder: Path
    objects: list[dict[str, Any]]
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    events: list[str] = field(default_factory=list)
    network: str = field(init=False)
    """The first three numbers of its addresses: some that nobody uses, not even what a killed test left."""
    tag: str = field(default_factory=lambda: f"n{os.getpid() % 10**5}{next(_numbers)}")

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        self.hosts.write_text("127.0.0.1 localhost\n")
        run(f"ip link add {self.tag} type bridge")
        used = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, text=True, check=True).stdout
        first = os.getpid() % 250
        numbers = [*range(first, 250), *range(first)]
        self.network = next(f"10.77.{number}" for number in numbers if f" 10.77.{number}." not in used)
        run(f"ip address add {self.network}.1/24 dev {self.tag}")
        run(f"ip link set {self.tag} up")
        return self

    def __exit__(self, *_):
        for pod in self.pods:
            pod.kill()
            pod.process.kill()
            pod.process.wait()
            subprocess.run(["ip", "netns", "delete", pod.network], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self.tag], capture_output=True, check=False)

    @property
    def hosts(self):
        """What every pod sees as /etc/hosts: the names of pods and services."""
        return self.folder / "hosts"

    def tell(self, text):
        self.events.append(f"{time.monotonic() - self.begun:7.1f} s  {text}")

    def find(self, kind, name):
        return next(item for item in self.objects if item["kind"] == kind and item["metadata"]["name"] == name)

    def names(self, name, address):
        """Let a name mean an address, and nothing else; what pods have open sees it, too."""
        lines = [line for line in self.hosts.read_text().splitlines() if line.split()[1] != name]
        self.hosts.write_text("\n".join([*lines, f"{address} {name}"]) + "\n")

    def serve(self, name):
        """Run a Deployment's pod, and name it as its Service does once it is ready."""
        template = self.find("Deployment", name)["spec"]["template"]
        container = template["spec"]["containers"][0]
        pod = self.start(name, template)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        probe = container["readinessProbe"]["httpGet"]
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{pod.address}:{ports[probe['port']]}{probe['path']}", timeout=2).close()
                break
            assert time.monotonic() < end, pod.output()
            time.sleep(0.2)
        self.names(name, pod.address)
        self.tell(f"{name} is ready")
        return pod

    def start(
        self,
        name,
        template,
        *,
        hostname="",
        env=None,  # what the controller adds
        labels=None,
        rate="",  # of its link, as tc takes it
    ):
        """Run a pod's first container."""
        number = len(self.pods) + 2
        address = f"{self.network}.{number}"
        network = f"{self.tag}-{number}"
        outside = f"{self.tag}v{number}"
        commands = [
            f"ip netns add {network}",
            f"ip link add {outside} type veth peer name eth0 netns {network}",
            f"ip link set {outside} master {self.tag} up",
            f"ip -n {network} address add {address}/24 dev eth0",
            f"ip -n {network} link set eth0 up",
            f"ip -n {network} link set lo up",
        ]
        if rate:
            shape = f"root tbf rate {rate} burst 64kb latency 400ms"
            commands.append(f"ip netns exec {network} tc qdisc add dev eth0 {shape}")
            commands.append(f"tc qdisc add dev {outside} {shape}")
        for command in commands:
            run(command)
        spec = template["spec"]
        container = spec["containers"][0]
        user = int(spec["securityContext"]["runAsUser"])
        place = self.folder / name
        mounts = {}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mounted in container["volumeMounts"]:
            folder = place / "volumes" / mounted["name"]
            folder.mkdir(parents=True)
            if "configMap" in volumes[mounted["name"]]:
                source = volumes[mounted["name"]]["configMap"]
                data = self.find("ConfigMap", source["name"])["data"]
                for item in source["items"]:
                    (folder / item["path"]).write_text(data[item["key"]])
            else:
                os.chown(folder, user, user)
            mounts[mounted["mountPath"]] = str(folder)
        (place / "root").mkdir()
        plan = {
            "hostname": hostname or name,
            "command": [*container["command"], *container.get("args", [])],
            "env": self._environment(container, labels or {}) | (env or {}),
            "user": user,
            "read_only": container["securityContext"]["readOnlyRootFilesystem"],
            "mounts": mounts,
            "hosts": str(self.hosts),
            "program": [folder for folder in (str(ROOT), sys.prefix, sys.base_prefix) if inside(folder)],
            "root": str(place / "root"),
        }
        (place / "spec.json").write_text(json.dumps(plan))
        log = place / "log"
        command = f"ip netns exec {network} unshare --mount --uts --ipc --pid --fork --kill-child".split()
        runtime = [*command, sys.executable, str(ROOT / "tests/hosts/pod.py"), str(place / "spec.json")]
        with log.open("wb") as output:
            process = subprocess.Popen(runtime, stdout=output, stderr=output, env=environment())
        pod = Pod(
            name=name,
            network=network,
            link=outside,
            address=address,
            log=log,
            process=process,
            started=time.monotonic(),
        )
        self.pods.append(pod)
        self.tell(f"{name} starts on {address}")
        return pod

    def _environment(self, container, labels):
        """As a container would get it, with PATH and PYTHONPATH as the image has them."""
        variables = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT / "pipeline")}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                variables |= self.find("ConfigMap", source["configMapRef"]["name"])["data"]
            else:
                name = source["secretRef"]["name"]
                assert name in self.secrets or source["secretRef"].get("optional"), f"no secret {name}"
                variables |= self.secrets.get(name, {})
        for item in container.get("env", []):
            if "value" in item:
                variables[item["name"]] = item["value"]
            else:
                path = item["valueFrom"]["fieldRef"]["fieldPath"]
                variables[item["name"]] = labels[path.removeprefix("metadata.labels['").removesuffix("']")]
        return variables


class Job:
    """An Indexed Job with backoffLimitPerIndex, as its controller runs it (kubernetes/pkg/controller/job).

    A pod that failed is replaced after backoff x 2^(n-1) seconds, where n counts the failures of its index, with those
    that are ignored.
    """

    def __init__(
        self,
        cluster,
        name,
        *,
        uid="uid-1",
        rates=None,
        backoff=2.0,  # seconds; a real controller's are 10
    ):
        self.cluster = cluster
        self.uid = uid
        self.rates = rates or {}
        self.backoff = backoff
        self.object = cluster.find("Job", name)
        self.size = self.object["spec"]["completions"]
        self.pods = {}
        self.done = set()
        self.failures = 0
        self.failed = ""
        self.count = 0
        self._counted = Counter()  # failures by index, without ignored ones
        self._all = Counter()
        self._due = {}

    def create(self, index):
        """A new pod for an index."""
        template = self.object["spec"]["template"]
        name = self.object["metadata"]["name"]
        self.count += 1
        pod = self.cluster.start(
            f"{name}-{index}-{self.uid}-{self.count}",
            template,
            hostname=f"{name}-{index}",
            env={"JOB_COMPLETION_INDEX": str(index)},
            labels={"batch.kubernetes.io/controller-uid": self.uid},
            rate=self.rates.get(index, ""),
        )
        self.cluster.names(f"{name}-{index}.{template['spec']['subdomain']}", pod.address)
        self.pods[index] = pod
        return pod

    def step(self):
        """Look at the pods and do what the policy says; whether the Job is over."""
        for index, due in list(self._due.items()):
            if time.monotonic() >= due:
                del self._due[index]
                self.create(index)
        for index, pod in list(self.pods.items()):
            code = pod.code
            if code is None:
                continue
            del self.pods[index]
            self.cluster.tell(f"{pod.name} ended with {code}")
            if code == 0:
                self.done.add(index)
            elif self.judge(code) == "FailJob":
                self.failed = f"{pod.name}: {pod.output()[-1000:]}"
            else:
                self._replace(index, pod, counts=self.judge(code) == "Count")
        if self.failed:
            for pod in self.pods.values():
                pod.kill(signal.SIGTERM)
        return bool(self.failed) or len(self.done) == self.size

    def _replace(self, index, pod, *, counts):
        self.failures += counts
        self._counted[index] += counts
        self._all[index] += 1
        if self._counted[index] > self.object["spec"]["backoffLimitPerIndex"]:  # maxFailedIndexes is 0
            self.failed = f"{pod.name}: {pod.output()[-1000:]}"
        self._due[index] = time.monotonic() + self.backoff * 2 ** (self._all[index] - 1)

    def take_node(self, index):
        """A node vanishes with its pod, and is taken out of the cluster: that is ignored, and the pod replaced."""
        pod = self.pods.pop(index)
        run(f"ip link set {pod.link} down")
        self.cluster.tell(f"the node of {pod.name} is gone")
        self._replace(index, pod, counts=False)

    def judge(self, code):
        """The action of the first rule that an exit code meets."""
        for rule in self.object["spec"]["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", []):
                return str(rule["action"])
        return "Count"

    def until(self, happened, seconds):
        """Go on until `happened()`."""
        end = time.monotonic() + seconds
        while not happened():
            over = self.step()
            if (over and not happened()) or time.monotonic() > end:
                texts = [f"== {pod.name}\n{pod.output()[-3000:]}" for pod in self.cluster.pods]
                raise AssertionError("\n".join([*self.cluster.events, self.failed, *texts]))
            time.sleep(0.1)


def manifest(name):
    return [item for item in yaml.safe_load_all((ROOT / "k8s" / name).read_text()) if item]
