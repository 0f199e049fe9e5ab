"""The manifests of a job of any size, from k8s/job.yaml."""

import math
import re
from typing import Any

import yaml

from naign import shipped
from naign.cluster.job import Job
from naign.cluster.ranks import check_shares, find_engine
from naign.config import Config, check, load, to_dict
from naign.errors import require
from naign.settings.read import read_yaml
from naign.storage.store import open_store

# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html; Google's names may have "_".
BUCKET = (
    r"(s3|gs|az)://(?![^/]*\.\.)[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[ -~]*)?|abfss://[a-z0-9-]+@[a-z0-9.]+(/[ -~]*)?"
)
PATH = r"\w[\w.-]*(/\w[\w.-]*)*/?"
CLAIM = "/claim"
"""Where a pod has its claim."""
NAME_OF_CLAIM = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
NAME = r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?"


def configure(job: Job) -> Config:
    """The run's configuration. Raises InputError where it does not fit the job; no message shows an address."""
    least, most = job.hosts
    pattern = PATH if job.claim else BUCKET
    shared = "pods share a bucket, or a volume by --claim: write s3://bucket/prefix, a bucket's name as S3 wants it"
    if job.claim:
        shared = f"with --claim={job.claim} write a path in that volume, such as runs/first, not a bucket"
    rules = (
        ("--data", job.data, pattern, shared),
        ("--run", job.run, pattern, shared),
        ("--claim", job.claim, f"({NAME_OF_CLAIM})?", "give the name of a PersistentVolumeClaim"),
        ("--endpoint", job.endpoint, r"(https?://[^\s@]+)?", "write http://host:port, without user and password"),
        ("--service-account", job.service_account, f"({NAME_OF_CLAIM})?", "give the name of a ServiceAccount"),
        ("--engine", job.engine, r"\w*", "give the name of a file in launch/, such as zero2"),
        (
            "--name",
            job.name,
            NAME,
            "give one of small letters, digits and '-', at most 42; by default --run ends in it",
        ),
    )
    require(
        (
            least >= 1 and job.gpus >= 0,
            f"{job.nodes} nodes of {job.gpus} GPUs: at least one node, and no fewer than 0 GPUs",
        )
    )
    for option, value, pattern, remedy in rules:
        require((re.fullmatch(pattern, value, re.ASCII), f"{option}: {remedy}"))
    apart = job.data.rstrip("/") != job.run.rstrip("/")
    unkeyed = job.service_account and "az" in (job.data[:2], job.run[:2])
    require(
        (apart, "--data and --run are the same place: give the run one of its own"),
        (not unkeyed, "az:// does not name the account, which a role needs: write abfss://container@account..."),
    )
    if not job.claim:
        open_store(job.data)
    if job.engine:
        engine = find_engine(job.engine, ranks=most * max(1, job.gpus))
        for_gpus = not engine.get("use_cpu")
        fits = for_gpus if job.gpus else not (for_gpus and engine["distributed_type"] in ("MULTI_GPU", "FSDP"))
        require((fits, f"--engine {job.engine} does not go with --gpus {job.gpus}"))
    settings = load(str(job.config)) if job.config else Config()
    settings.data.path = job.data
    settings.run.path = f"/run/naign/{job.name}"
    settings.run.remote = job.run.rstrip("/")
    if job.claim:
        settings.data.path = f"{CLAIM}/{job.data}"
        settings.run.path = f"{CLAIM}/{job.run}"
        settings.run.remote = ""
    written: dict[str, Any] = read_yaml(str(job.config)) if job.config else {}
    if "within" not in (written.get("stop") or {}):
        settings.stop.within = 60
    check(settings)
    check_shares(settings, least, most, max(1, job.gpus))
    return settings


def render_k8s(job: Job) -> str:
    """job.yaml for this job, for `kubectl apply -f -`, with a bucket or a volume instead of its S3 server."""
    settings = configure(job)
    name = job.name
    access = "" if job.claim or job.service_account else "#   access    by the Secret naign-s3, or the nodes' role\n"
    head = (
        f"# {name}. Pods: {job.nodes}; GPUs of each: {job.gpus}\n{access}"
        "#   apply     kubectl apply -f FILE      clean up  kubectl delete -f FILE, also before it is applied again\n"
        f"#   wait      kubectl wait --for=condition=Ready pod -l app.kubernetes.io/name={name} --timeout=30m\n"
        f"#   logs      kubectl logs -f -l app.kubernetes.io/name={name} --prefix --max-log-requests={job.hosts[1]}\n"
    )
    return head + yaml.dump_all(_fit(job, settings), Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, to be read and edited."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _fit(job: Job, settings: Config) -> list[dict[str, Any]]:
    """The objects of job.yaml but those of its S3 server, with the job's name, size and configuration."""
    least, most = job.hosts
    changes = {
        "naign-0.naign": job.head,
        "name: naign-store": f"name: {job.name}.store",  # names have no dot: it is never that of another run
        'value: "2"': f'value: "{job.nodes}"',
        "completions: 2": f"completions: {most}",
        "parallelism: 2": f"parallelism: {most}",
    }
    text = shipped("k8s/job.yaml").read_text().partition("---\n# S3 server")[0]
    for old, new in changes.items():
        text = text.replace(old, new)
    text = re.sub(r"(name|subdomain): naign(?=[\n,}])", rf'\1: "{job.name}"', text)
    store, run, service, training = yaml.safe_load_all(text)
    store["data"] = {"AWS_REGION": job.region}
    if job.endpoint:
        store["data"]["AWS_ENDPOINT_URL"] = job.endpoint
    run["data"]["run.yaml"] = yaml.safe_dump(to_dict(settings), sort_keys=False)
    store["immutable"] = True  # a second run under one name is refused
    run["immutable"] = True
    pod = training["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pod["terminationGracePeriodSeconds"] = math.ceil(settings.stop.within) + 30
    container["image"] = job.image
    training["spec"]["maxFailedIndexes"] = most - least  # the others go on
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
        del container["envFrom"][1]  # keys of a Secret would go before the role
    if "abfss" in (job.data[:5], job.run[:5]):  # by Entra Workload ID
        training["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"] = "true"
    if job.claim:
        pod["volumes"].append({"name": "claim", "persistentVolumeClaim": {"claimName": job.claim}})
        container["volumeMounts"].append({"name": "claim", "mountPath": CLAIM})
    gpus = job.gpus
    if job.engine:
        container["command"][2:2] = ["--engine", job.engine]
    if gpus:  # with processors, memory and shared memory for them
        container["command"][2:2] = ["--gpus", str(gpus)]
        container["resources"] = {
            "requests": {"cpu": str(3 * gpus), "memory": f"{12 * gpus}Gi"},
            "limits": {"nvidia.com/gpu": str(gpus), "memory": f"{32 * gpus}Gi"},
        }
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        (shared,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        shared["emptyDir"]["sizeLimit"] = f"{4 * gpus}Gi"
    if job.kind == "jobset":
        return [store, run, _as_jobset(training)]
    return [store, run, service, training]


def _as_jobset(training: dict[str, Any]) -> dict[str, Any]:
    """The Job as a JobSet, which makes the Service itself."""
    spec = training["spec"]
    subdomain = spec["template"]["spec"].pop("subdomain")
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": training["metadata"],
        "spec": {
            "ttlSecondsAfterFinished": spec.pop("ttlSecondsAfterFinished"),
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": subdomain},
            "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": spec}}],
        },
    }
