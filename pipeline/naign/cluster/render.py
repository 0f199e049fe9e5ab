"""Manifests and scripts for a job of any size, from those in k8s/ and launch/, and what the job computes and stores."""

import hashlib
import json
import math
import re
import shlex
from dataclasses import replace
from typing import Any

import yaml

from naign import shipped
from naign.cluster.job import Job
from naign.config import Config, check, load, to_dict
from naign.data.mixing import DataSets
from naign.errors import InputError, Unavailable, printable, require
from naign.settings.read import read_yaml
from naign.storage.retry import give_up_after
from naign.storage.store import use_endpoint

_HOST, _PART = r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?", r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
# github.com/distribution/reference: [host[:port]/]name[:tag][@digest], in ASCII.
IMAGE = rf"({_HOST}(\.{_HOST})*(:\d{{1,5}})?/)?{_PART}(/{_PART})*(:\w[\w.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?"
# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html.
BUCKET = r"s3://(?![^/]*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?"
NAME = r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?"


def _check_options(*rules: tuple[str, str, str, str]) -> None:
    """InputError for the first (option, value, pattern, what it must be) whose value does not match."""
    for option, value, pattern, must in rules:
        if not (value.isprintable() and re.fullmatch(pattern, value, re.ASCII)):
            shown = re.sub(".*@", "...@", value, flags=re.DOTALL)  # without user and password
            raise InputError(f"{option} {printable(shown)}{must}")


def configure(job: Job) -> Config:
    """The run's configuration. Raises InputError where it does not fit the size of the job."""
    hosts, place = f"{job.nodes} nodes of {job.gpus} GPUs", rf"(?!.*://).*\S.*|{BUCKET}"
    bucket = ": write s3://bucket/prefix, a bucket's name as S3 wants it, or for Slurm a shared folder"
    require(
        (job.nodes >= 1 and job.gpus >= 0, f"{hosts}: at least one node, and no fewer than 0 GPUs"),
        (job.ranks <= 2**16, f"{hosts} are too many"),
    )
    _check_options(
        ("--name", job.name, NAME, ": small letters, digits and '-', at most 42, as Kubernetes wants names"),
        ("--data", job.data, place, bucket),
        ("--run", job.run, place, bucket),
    )
    settings = load(str(job.config)) if job.config else Config()
    settings.data.path, settings.run.path, settings.run.remote = job.data, job.run, ""
    if job.run.startswith("s3://"):
        settings.run.path, settings.run.remote = f"/run/naign/{job.name}", job.run.rstrip("/")
    check(settings)
    batch, least = settings.train.batch, job.ranks * settings.train.accumulate
    remedy = f"set a multiple of {least} in --config, match.round to one of that; a run that exists needs other --nodes"
    require((batch % least == 0, f"train.batch={batch} cannot be shared by {job.ranks} ranks: {remedy}"))
    return settings


def render_k8s(job: Job) -> str:
    """job.yaml for this job, for `kubectl apply -f -`, with a bucket instead of its S3 server."""
    settings, name, account = configure(job), job.name, job.service_account
    bucket = ": pods share a bucket only: give s3://bucket/prefix"
    address = ": it must be http://host:port or https://host, without user and password"
    _check_options(
        ("--data", job.data, "s3://.*", bucket),
        ("--run", job.run, "s3://.*", bucket),
        ("--image", job.image, IMAGE, " is no name of an image: [registry/]name[:tag][@digest]"),
        ("--service-account", account, r"([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?)?", " is no name of a service account"),
        ("--region", job.region, r"[a-z0-9-]+", " is no name of a region, as eu-west-1"),
        ("--endpoint", job.endpoint, r"(https?://[^\s@]+)?", address),
    )
    if "within" not in ((read_yaml(str(job.config)).get("stop") if job.config else None) or {}):
        settings.stop.within = 60
    access = f"the role of the service account {account}" if account else "the Secret naign-s3, if there is one"
    head = (
        f"# {name}: {job.nodes} pods {f'of {job.gpus} GPUs' if job.gpus else 'without GPUs'}\n"
        "#   apply     kubectl apply -f FILE      clean up  kubectl delete -f FILE, also before it is applied again\n"
        f"#   wait      kubectl wait --for=condition=Ready pod -l app.kubernetes.io/name={name} --timeout=30m\n"
        f"#   logs      kubectl logs -f -l app.kubernetes.io/name={name} --prefix --max-log-requests={job.nodes}\n"
        f"#   access    {access}\n"
    )
    return head + yaml.dump_all(_fit(job, settings), Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, to be read and edited."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _fit(job: Job, settings: Config) -> list[dict[str, Any]]:
    """The objects of job.yaml but those of its S3 server, with the job's name, size and configuration."""
    name, gpus = job.name, job.gpus
    text = shipped("k8s/base/job.yaml").read_text()
    # No run's name has a dot, so that none can be that of another run's ConfigMap for its store.
    text = re.sub(r"\bname: naign-store(?![\w-])", f'name: "{name}.store"', text)
    text = re.sub(r"\b(name|subdomain): naign(?![\w-])", rf'\1: "{name}"', text)
    text = text.replace("naign-0.naign", f"{name}-0.{name}")
    every = yaml.safe_load_all(text)
    objects = [item for item in every if item["metadata"]["labels"]["app.kubernetes.io/name"] == name]
    store, run, _, training = objects
    store["data"] = {"AWS_REGION": job.region} | ({"AWS_ENDPOINT_URL": job.endpoint} if job.endpoint else {})
    run["data"]["run.yaml"] = yaml.safe_dump(to_dict(settings), sort_keys=False)
    store["immutable"] = run["immutable"] = True
    spec = training["spec"]
    spec["completions"] = spec["parallelism"] = job.nodes
    # The API server then refuses a second `apply` under one name: replaced pods would read the other run's settings.
    digest = hashlib.sha256(json.dumps([store["data"], run["data"]]).encode()).hexdigest()
    spec["template"]["metadata"]["annotations"] = {"naign/config-sha256": digest}
    pod = spec["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = math.ceil(settings.stop.within) + 30
    (container,) = pod["containers"]
    container["image"] = job.image
    next(each for each in container["env"] if each["name"] == "NAIGN_HOSTS")["value"] = str(job.nodes)
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
        del container["envFrom"][1]  # keys of a Secret would go before the role
    if gpus:
        next(each for each in pod["volumes"] if each["name"] == "shm")["emptyDir"]["sizeLimit"] = f"{4 * gpus}Gi"
        container["command"][2:2] = ["--gpus", str(gpus)]
        container["resources"] = {
            "requests": {"cpu": str(3 * gpus), "memory": f"{12 * gpus}Gi"},
            "limits": {"nvidia.com/gpu": str(gpus), "memory": f"{32 * gpus}Gi"},
        }
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return objects


def render_slurm(job: Job) -> str:
    """launch/slurm.sbatch for this job, for `sbatch`, with the options filled in. Its image is not used."""
    settings, config = configure(job), job.config
    remote = settings.run.remote
    copied = f"/tmp/{re.sub(r'[^A-Za-z0-9.-]+', '-', remote.removeprefix('s3://'))}"
    options = [
        *([f"--config={config.resolve() if config.is_file() else config}"] if config else []),
        f"--data.path={job.data}",
        f"--run.path={copied if remote else settings.run.path}",
        f"--run.remote={remote}",  # also if that is empty: the configuration may have one
        f"--train.precision={settings.train.precision}",
    ]
    each = {"gpus-per-node": job.gpus, "cpus-per-task": 4 * job.gpus, "mem": f"{16 * job.gpus}G"} if job.gpus else {}
    gpus = "".join(f"#SBATCH --{option}={value}\n" for option, value in each.items())
    text = re.sub(r"launch/slurm\.sbatch( --.*)?", "FILE", shipped("launch/slurm.sbatch").read_text())
    text = re.sub(r"#SBATCH --nodes=\d+\n", f"#SBATCH --nodes={job.nodes}\n{gpus}", text)
    text = re.sub(r"naign(?=-\*)|(?<=--job-name=)naign", job.name, text)  # also in the names of its logs
    return text.replace('naign launch "$@"', f'naign launch {shlex.join(options)} "$@"').rstrip()


def predict(job: Job) -> str:
    """A table of what the run computes, stores and sends: counted from its configuration, without any speed."""
    import torch

    from naign.model.networks import build_network
    from naign.model.prior import build_prior
    from naign.observe.speed import fit_flops, forward_flops

    settings, unknown, stored = load(str(job.config)) if job.config else Config(), "", 0
    shape: tuple[int, ...] = (1, 28, 28)
    labels: tuple[str, ...] = ("unknown",)
    use_endpoint(job.endpoint)
    try:
        with give_up_after(0):  # a cluster's bucket is often out of reach from here
            sets = DataSets(replace(settings.data, path=job.data))
        shape, labels = sets.shape, sets.manifest.labels
        stored = sum(shard.bytes for split in sets.manifest.splits.values() for shard in split.shards)
    except (InputError, Unavailable) as error:
        unknown = f"\ncounted with images of 1x28x28, since {job.data} cannot be read from here: {error}"
    with torch.device("meta"):
        network = build_network(settings.model, shape)
        prior = build_prior(settings.prior, shape, network, labels=labels)
        drawn, saved = (sum(t.nbytes for t in state().values()) for state in (prior.state_dict, prior.training_state))
    weights, forward = sum(value.nbytes for value in network.parameters()), forward_flops(network, shape)
    match, train, keep = settings.match, settings.train, settings.checkpoint.keep
    images, pool, width = match.round * train.passes, match.pool * settings.objective.needs_match, math.prod(shape)
    generate, search = pool * forward, 2 * width * match.round * pool
    fit = images * fit_flops(forward, settings.objective.forwards)
    sent = match.round * (width * 4 + 16 * job.ranks) * bool(pool) + images // train.batch * 2 * weights
    rounds, copies = -(-train.images // images), 4 + bool(train.ema)  # weights, gradients, two moments; average
    between = f"; {sent / 1e9:.2g} GB between nodes" if job.nodes > 1 else ""
    rows = (
        ("GPUs" if job.gpus else "CPU hosts", f"{job.ranks}, {train.batch // job.ranks} images a step each"),
        ("parameters", f"f {weights / 4e6:.2f} M, prior {drawn / 4e6:.2f} M; {forward / 1e9:.2f} GFLOP a forward of f"),
        ("data", f"{stored / 1e9:.2f} GB" if stored else "unknown"),
        ("a rank", f"{(copies * weights + saved) / 1e9:.2g} GB of weights, optimizers, f's gradients; no activations"),
        ("a checkpoint", f"{((copies - 1) * weights + (copies - 3) * drawn + saved) / 1e9:.3f} GB, {keep} kept"),
        ("a round", f"{(generate + search + fit) / 1e12:.2g} TFLOP: generate {generate / 1e12:.2g}, search at most"
         f" {search / 1e12:.2g}, fit {fit / 1e12:.2g}{', learn (the prior) not counted' * prior.learns}{between}"),
        ("the run", f"{rounds} rounds, {rounds * (generate + search + fit) / 1e15:.2g} PFLOP"),
    )  # fmt: skip
    return "\n".join(f"{name:12}  {text}" for name, text in rows) + unknown
