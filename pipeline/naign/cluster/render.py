"""Manifests and scripts for a job of any size, from k8s/job.yaml and launch/slurm.sbatch."""

import hashlib
import json
import math
import re
import shlex
from typing import Any

import yaml

from naign import shipped
from naign.cluster.job import Job
from naign.config import Config, check, load, to_dict
from naign.errors import InputError, printable, require
from naign.settings.read import read_yaml

# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html.
BUCKET = r"s3://(?![^/]*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?"
NAME = r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?"
SLURM = "launch/slurm.sbatch"


def _require_match(option: str, value: str, pattern: str, must: str) -> None:
    """InputError, which shows no user and password, for an option's value that does not match."""
    if not (value.isprintable() and re.fullmatch(pattern, value, re.ASCII)):
        shown = re.sub(".*@", "...@", value, flags=re.DOTALL)
        raise InputError(f"{option} {printable(shown)}{must}")


def configure(job: Job) -> Config:
    """The run's configuration. Raises InputError where it does not fit the size of the job."""
    size = f"{job.nodes} nodes of {job.gpus} GPUs"
    require(
        (job.nodes >= 1 and job.gpus >= 0, f"{size}: at least one node, and no fewer than 0 GPUs"),
        (job.ranks <= 2**16, f"{size} are too many"),
    )
    _require_match("--name", job.name, NAME, ": small letters, digits and '-', at most 42, as Kubernetes wants names")
    folder_or_bucket = rf"(?!.*://).*\S.*|{BUCKET}"
    for option, place in (("--data", job.data), ("--run", job.run)):
        must = ": write s3://bucket/prefix, a bucket's name as S3 wants it, or for Slurm a shared folder"
        _require_match(option, place, folder_or_bucket, must)
    settings = load(str(job.config)) if job.config else Config()
    settings.data.path = job.data
    settings.run.path = job.run
    settings.run.remote = ""
    if job.run.startswith("s3://"):
        settings.run.path = f"/run/naign/{job.name}"
        settings.run.remote = job.run.rstrip("/")
    check(settings)
    batch = settings.train.batch
    least = job.ranks * settings.train.accumulate
    remedy = f"set a multiple of {least} in --config, match.round to one of that; a run that exists needs other --nodes"
    require((batch % least == 0, f"train.batch={batch} cannot be shared by {job.ranks} ranks: {remedy}"))
    return settings


def render_k8s(job: Job) -> str:
    """job.yaml for this job, for `kubectl apply -f -`, with a bucket instead of its S3 server."""
    settings = configure(job)
    account = job.service_account
    for option, place in (("--data", job.data), ("--run", job.run)):
        _require_match(option, place, "s3://.*", ": pods share a bucket only: give s3://bucket/prefix")
    address = ": it must be http://host:port or https://host, without user and password"
    _require_match("--endpoint", job.endpoint, r"(https?://[^\s@]+)?", address)
    written: dict[str, Any] = read_yaml(str(job.config)) if job.config else {}
    if "within" not in (written.get("stop") or {}):
        settings.stop.within = 60
    access = f"the role of the service account {account}" if account else "the Secret naign-s3, if there is one"
    name = job.name
    images = settings.train.batch // job.ranks
    head = (
        f"# {name}: {job.nodes} pods, {job.gpus} GPUs each; {images} images a step and rank\n"
        "#   apply     kubectl apply -f FILE      clean up  kubectl delete -f FILE, also before it is applied again\n"
        f"#   wait      kubectl wait --for=condition=Ready pod -l app.kubernetes.io/name={name} --timeout=30m\n"
        f"#   logs      kubectl logs -f -l app.kubernetes.io/name={name} --prefix --max-log-requests={job.nodes}\n"
        f"#   access    {access}\n"
    )
    return head + yaml.dump_all(_fit(job, settings), Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, to be read and edited."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _rename(value: Any, names: dict[str, str]) -> Any:
    """The value, with those of its keys `name`, `subdomain`, ... that `names` has replaced."""
    if isinstance(value, list):
        return [_rename(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, item in value.items():
        if key in ("name", "subdomain", "value", "app.kubernetes.io/name") and isinstance(item, str):
            renamed[key] = names.get(item, item)
        else:
            renamed[key] = _rename(item, names)
    return renamed


def _fit(job: Job, settings: Config) -> list[dict[str, Any]]:
    """The objects of job.yaml but those of its S3 server, with the job's name, size and configuration."""
    # A run's name has no dot, so the ConfigMap of one run's store never has the name of another run.
    names = {
        "naign": job.name,
        "naign-store": f"{job.name}.store",
        "naign-0.naign": f"{job.name}-0.{job.name}",
    }
    shipped_objects = yaml.safe_load_all(shipped("k8s/job.yaml").read_text())
    kept = [item for item in shipped_objects if item["metadata"]["labels"]["app.kubernetes.io/name"] == "naign"]
    objects: list[dict[str, Any]] = _rename(kept, names)
    store, run, _, training = objects
    store["data"] = {"AWS_REGION": job.region}
    if job.endpoint:
        store["data"]["AWS_ENDPOINT_URL"] = job.endpoint
    run["data"]["run.yaml"] = yaml.safe_dump(to_dict(settings), sort_keys=False)
    store["immutable"] = True
    run["immutable"] = True
    spec = training["spec"]
    spec["completions"] = job.nodes
    spec["parallelism"] = job.nodes
    # The API server then refuses a second `apply` under one name: replaced pods would read the other run's settings.
    digest = hashlib.sha256(json.dumps([store["data"], run["data"]]).encode()).hexdigest()
    spec["template"]["metadata"]["annotations"] = {"naign/config-sha256": digest}
    pod = spec["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = math.ceil(settings.stop.within) + 30
    (container,) = pod["containers"]
    container["image"] = job.image
    for variable in container["env"]:
        if variable["name"] == "NAIGN_HOSTS":
            variable["value"] = str(job.nodes)
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
        del container["envFrom"][1]  # keys of a Secret would go before the role
    if job.gpus:
        _add_gpus(pod, job.gpus)
    return objects


def _add_gpus(pod: dict[str, Any], gpus: int) -> None:
    """Request GPUs for a pod's container, with processors, memory and shared memory for them."""
    (container,) = pod["containers"]
    container["command"][2:2] = ["--gpus", str(gpus)]
    container["resources"] = {
        "requests": {"cpu": str(3 * gpus), "memory": f"{12 * gpus}Gi"},
        "limits": {"nvidia.com/gpu": str(gpus), "memory": f"{32 * gpus}Gi"},
    }
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    for volume in pod["volumes"]:
        if volume["name"] == "shm":
            volume["emptyDir"]["sizeLimit"] = f"{4 * gpus}Gi"


def render_slurm(job: Job) -> str:
    """launch/slurm.sbatch for this job, for `sbatch`, with the options filled in. Its image is not used."""
    settings = configure(job)
    options = []
    if job.config:
        known = job.config.resolve() if job.config.is_file() else job.config
        options.append(f"--config={known}")
    options.append(f"--data.path={job.data}")
    options.append(f"--run.remote={settings.run.remote}")  # also if that is empty: the configuration may have one
    options.append(f"--train.precision={settings.train.precision}")
    path = shlex.quote(job.run)
    if settings.run.remote:
        # In the home folder, since another user could own a folder in /tmp whose name can be guessed.
        path = '"$HOME"/naign-runs/' + re.sub(r"[^A-Za-z0-9.-]+", "-", job.run.removeprefix("s3://"))
    resources = {"job-name": job.name, "nodes": job.nodes}
    if job.gpus:
        resources |= {"gpus-per-node": job.gpus, "cpus-per-task": 4 * job.gpus, "mem": f"{16 * job.gpus}G"}
    head, _, body = shipped(SLURM).read_text().partition("\n\n")
    lines = [
        "#!/bin/bash",
        "#   sbatch FILE [--section.key=value ...]",
        f"#   squeue --me; tail -f {job.name}-*-host*.log; scancel JOBID",
        *(f"#SBATCH --{option}={value}" for option, value in resources.items()),
    ]
    for line in head.splitlines():
        option = line.removeprefix("#SBATCH --").partition("=")[0]
        if line.startswith("#SBATCH") and option not in resources:
            lines.append(line)
    lines += ["", f'set -- {shlex.join(options)} --run.path={path} "$@"', "", body.rstrip()]
    return "\n".join(lines)
