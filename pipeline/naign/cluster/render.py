"""The manifests of a job of any size, from k8s/job.yaml."""

import json
import math
import re
from typing import Any

import yaml

from naign import shipped
from naign.cluster.job import Job
from naign.config import Config, check, load, to_dict
from naign.errors import require
from naign.settings.read import read_yaml

# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html.
BUCKET = r"s3://(?![^/]*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[ -~]*)?"
NAME = r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?"


def configure(job: Job) -> Config:
    """The run's configuration. Raises InputError where it does not fit the job; no message shows an address."""
    size = f"{job.nodes} nodes of {job.gpus} GPUs"
    bucket = "pods share a bucket only: write s3://bucket/prefix, a bucket's name as S3 wants it"
    rules = (
        ("--data", job.data, BUCKET, bucket),
        ("--run", job.run, BUCKET, bucket),
        ("--endpoint", job.endpoint, r"(https?://[^\s@]+)?", "write http://host:port, without user and password"),
        ("--name", job.name, NAME, "give one of small letters, digits and '-', at most 42, as Kubernetes wants names"),
    )
    require((job.nodes >= 1 and job.gpus >= 0, f"{size}: at least one node, and no fewer than 0 GPUs"))
    for option, value, pattern, remedy in rules:
        require((re.fullmatch(pattern, value, re.ASCII), f"{option}: {remedy}"))
    settings = load(str(job.config)) if job.config else Config()
    settings.data.path = job.data
    settings.run.path = f"/run/naign/{job.name}"
    settings.run.remote = job.run.rstrip("/")
    written: dict[str, Any] = read_yaml(str(job.config)) if job.config else {}
    if "within" not in (written.get("stop") or {}):
        settings.stop.within = 60
    check(settings)
    batch = settings.train.batch
    least = job.ranks * settings.train.accumulate
    remedy = f"set a multiple of {least} in --config, match.round to one of that; a run that exists needs other --nodes"
    require((batch % least == 0, f"train.batch={batch} cannot be shared by {job.ranks} ranks: {remedy}"))
    return settings


def render_k8s(job: Job) -> str:
    """job.yaml for this job, for `kubectl apply -f -`, with a bucket instead of its S3 server."""
    settings = configure(job)
    name = job.name
    head = (
        f"# {name}: {job.nodes} pods, {job.gpus} GPUs each\n"
        "#   apply     kubectl apply -f FILE      clean up  kubectl delete -f FILE, also before it is applied again\n"
        f"#   wait      kubectl wait --for=condition=Ready pod -l app.kubernetes.io/name={name} --timeout=30m\n"
        f"#   logs      kubectl logs -f -l app.kubernetes.io/name={name} --prefix --max-log-requests={job.nodes}\n"
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
    changes = {
        "naign-0.naign": f"{job.name}-0.{job.name}",
        "name: naign-store": f"name: {job.name}.store",  # names have no dot: it is never that of another run
        'value: "2"': f'value: "{job.nodes}"',
        "completions: 2": f"completions: {job.nodes}",
        "parallelism: 2": f"parallelism: {job.nodes}",
        "image: naign:latest": f"image: {json.dumps(job.image)}",
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
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
        del container["envFrom"][1]  # keys of a Secret would go before the role
    gpus = job.gpus
    if gpus:  # with processors, memory and shared memory for them
        container["command"][2:2] = ["--gpus", str(gpus)]
        container["resources"] = {
            "requests": {"cpu": str(3 * gpus), "memory": f"{12 * gpus}Gi"},
            "limits": {"nvidia.com/gpu": str(gpus), "memory": f"{32 * gpus}Gi"},
        }
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        (shared,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        shared["emptyDir"]["sizeLimit"] = f"{4 * gpus}Gi"
    return [store, run, service, training]
