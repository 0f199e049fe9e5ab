"""Manifests and scripts for a job of any size, from those in k8s/ and launch/, and an estimate of what it costs."""

import hashlib
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config, check, load, to_dict
from pipeline.data.format.manifest import Manifest
from pipeline.errors import InputError, Unavailable, printable
from pipeline.storage.retry import at_most
from pipeline.storage.store import use_endpoint

ROOT = Path(__file__).resolve().parents[2]

Object = dict[str, Any]
"""A Kubernetes object."""

MFU = 0.3
"""Model FLOPs utilization: the share of a GPU's peak that training of convolutions reaches, by experience."""

LAUNCH = 2e-3
"""Seconds of kernel launches in a step, or a block of samples: the least that either takes on a GPU."""

CPU_TFLOPS = 0.1
"""TFLOP/s of a host without GPUs: two or four cores of a server."""

_HOST, _PART = r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?", r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
IMAGE = rf"({_HOST}(\.{_HOST})*(:\d{{1,5}})?/)?{_PART}(/{_PART})*(:\w[\w.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?"
"""github.com/distribution/reference: [host[:port]/]name[:tag][@digest], in ASCII."""

BUCKET = r"s3://(?![^/]*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?"
"""docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The size and surroundings of a job."""

    nodes: int
    gpus: int  # of each node; 0: CPUs
    gpu: str = "h100"
    bandwidth: float = 10.0  # GB/s between nodes
    account: str = ""  # service account of the pods
    endpoint: str = ""  # address of the S3 server; '': AWS
    region: str = "us-east-1"

    @property
    def ranks(self) -> int:
        return self.nodes * max(1, self.gpus)


def name_after(run: str) -> str:
    """A name that Kubernetes accepts: the last part of the run's path, or one made from it and a hash of the path."""
    run = run.rstrip("/")
    last = run.rpartition("/")[2]
    name = re.sub(r"[^a-z0-9]+", "-", last.lower()).lstrip("-0123456789").rstrip("-")
    if name == last and len(name) <= 42:
        return name
    digest = hashlib.sha256(run.encode(errors="surrogateescape")).hexdigest()
    return f"{name[:33].rstrip('-') or 'naign'}-{digest[:8]}"


def _shown(text: str) -> str:
    """An option's value for a message: on one line, without user and password."""
    return printable(re.sub(r".*@", "...@", text, flags=re.DOTALL))


def settings(size: Size, data: str, run: str, config: Path | None, name: str) -> Config:
    """The run's configuration. Raises InputError where it does not fit this size."""
    if size.nodes < 1 or size.gpus < 0:
        raise InputError(f"{size.nodes} nodes of {size.gpus} GPUs: at least one node, and no fewer than 0 GPUs")
    if not 0 < size.bandwidth < 1e6:
        raise InputError(f"--bandwidth {size.bandwidth}: it must be positive, in GB/s")
    if size.ranks > 2**16:
        raise InputError(f"{size.nodes} nodes of {size.gpus} GPUs are too many")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name):
        raise InputError(f"--name {_shown(name)}: small letters, digits and '-', at most 42, as Kubernetes wants names")
    for option, path in (("--data", data), ("--run", run)):
        if not path.isprintable() or ("://" in path and not re.fullmatch(BUCKET, path)):
            raise InputError(f"{option} {_shown(path)}: write s3://bucket/prefix, a bucket's name as S3 wants it")
    found = load(str(config or ROOT / "configs/mnist.yaml"))
    found.data.path = data
    if run.startswith("s3://"):
        found.run.path, found.run.remote = f"/run/naign/{name}", run.rstrip("/")
    else:
        found.run.path, found.run.remote = run, ""
    if size.gpus and not found.train.precision:
        found.train.precision = "bf16"
    check(found)
    if found.train.batch % (size.ranks * found.train.accumulate):
        least = size.ranks * found.train.accumulate
        raise InputError(
            f"train.batch={found.train.batch} cannot be shared by {size.ranks} ranks: in a --config set a multiple of "
            f"{least}, and match.round to a multiple of that"
        )
    return found


def render_k8s(size: Size, *, image: str, data: str, run: str, config: Path | None, name: str) -> str:
    """job.yaml for this size, for `kubectl apply -f -`, with a bucket instead of its S3 server."""
    for option, path in (("--data", data), ("--run", run)):
        if not path.startswith("s3://"):
            raise InputError(f"{option} {_shown(path)}: pods share a bucket only: give s3://bucket/prefix")
    if not re.fullmatch(IMAGE, image, re.ASCII):
        raise InputError(f"--image {_shown(image)} is no name of an image: [registry/]name[:tag][@digest]")
    if size.account and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", size.account):
        raise InputError(f"--service-account {_shown(size.account)} is no name of a service account")
    if not re.fullmatch(r"[a-z0-9-]+", size.region):
        raise InputError(f"--region {_shown(size.region)} is no name of a region, as eu-west-1")
    if size.endpoint and not (re.fullmatch(r"https?://[^\s@]+", size.endpoint) and size.endpoint.isprintable()):
        raise InputError("--endpoint must be http://host:port or https://host, without user and password")
    found = settings(size, data, run, config, name)
    found.stop.within = 60
    file = ROOT / "k8s/base/job.yaml"
    if not file.exists():
        raise InputError(f"{file} is not there: run this from a checkout of the project, or in its image")
    objects = [item for item in yaml.safe_load_all(file.read_text()) if item["kind"] != "Deployment"]
    objects = [item for item in objects if (item["kind"], item["metadata"]["name"]) != ("Service", "naign-store")]
    for item in objects:
        _fit(item, size, image, found, name)
    _bind(objects)
    head = (
        f"# {name}: {size.nodes} pods" + (f" of {size.gpus} GPUs" if size.gpus else " without GPUs") + "\n"
        f"#   apply     kubectl apply -f FILE      clean up  kubectl delete -f FILE, also before it is applied again\n"
        f"#   logs      kubectl logs -f -l app.kubernetes.io/name={name} --prefix --max-log-requests={size.nodes}\n"
        "#   access    "
        + (
            f"the role of the service account {size.account}"
            if size.account
            else "the Secret naign-s3, if there is one"
        )
        + "\n"
    )
    return head + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, to be read and edited."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _bind(objects: list[Object]) -> None:
    """Make the API server refuse a second `apply` under one name: replaced pods would read the other run's settings."""
    maps = [item for item in objects if item["kind"] == "ConfigMap"]
    digest = hashlib.sha256(json.dumps([item["data"] for item in maps]).encode()).hexdigest()
    for item in maps:
        item["immutable"] = True
    (job,) = (item for item in objects if item["kind"] == "Job")
    job["spec"]["template"]["metadata"]["annotations"] = {"naign/config-sha256": digest}


def _fit(item: Object, size: Size, image: str, config: Config, name: str) -> None:
    """Set the name, the size and the configuration in one object of job.yaml."""
    old = item["metadata"]["name"]
    item["metadata"]["name"] = old.replace("naign", name, 1)
    item["metadata"]["labels"]["app.kubernetes.io/name"] = name
    if item["kind"] == "ConfigMap" and "run.yaml" in item["data"]:
        item["data"]["run.yaml"] = yaml.safe_dump(to_dict(config), sort_keys=False)
    elif item["kind"] == "ConfigMap":
        item["data"] = {"AWS_REGION": size.region} | ({"AWS_ENDPOINT_URL": size.endpoint} if size.endpoint else {})
    elif item["kind"] == "Service":
        item["spec"]["selector"]["app.kubernetes.io/name"] = name
    elif item["kind"] == "Job":
        spec, pod = item["spec"], item["spec"]["template"]["spec"]
        spec["completions"] = spec["parallelism"] = size.nodes
        spec["template"]["metadata"]["labels"]["app.kubernetes.io/name"] = name
        pod["subdomain"] = name
        (spread,) = pod["topologySpreadConstraints"]
        spread["labelSelector"]["matchLabels"]["app.kubernetes.io/name"] = name
        (container,) = pod["containers"]
        container["image"] = image
        for variable in container["env"]:
            if variable["name"] == "NAIGN_HOSTS":
                variable["value"] = str(size.nodes)
            if variable["name"] == "NAIGN_HEAD":
                variable["value"] = f"{name}-0.{name}"
        container["envFrom"][0]["configMapRef"]["name"] = f"{name}-store"
        for volume in pod["volumes"]:
            if "configMap" in volume:
                volume["configMap"]["name"] = name
            if volume["name"] == "shm" and size.gpus:
                volume["emptyDir"]["sizeLimit"] = f"{4 * size.gpus}Gi"
        if size.account:
            pod["serviceAccountName"] = size.account
            del container["envFrom"][1]  # keys of a Secret would go before the role
        if size.gpus:
            container["command"][2:2] = ["--gpus", str(size.gpus)]
            memory = {"memory": f"{12 * size.gpus}Gi"}
            container["resources"] = {
                "requests": {"cpu": str(3 * size.gpus), **memory},
                "limits": {"nvidia.com/gpu": str(size.gpus), "memory": f"{32 * size.gpus}Gi"},
            }
            pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def render_slurm(size: Size, *, image: str, data: str, run: str, config: Path | None, name: str) -> str:
    """launch/slurm.sbatch for this size, for `sbatch`, with the options filled in. `image` is not used."""
    found = settings(size, data, run, config, name)
    text = (ROOT / "launch/slurm.sbatch").read_text()
    options = [f"--data.path={data}", f"--run.path={found.run.path}"]
    if config:
        options = [f"--config={config.resolve()}", *options]
    if found.run.remote:
        options[-1] = f"--run.path=/tmp/{re.sub(r'[^A-Za-z0-9.-]+', '-', found.run.remote.removeprefix('s3://'))}"
        options.append(f"--run.remote={found.run.remote}")
    else:
        options.append("--run.remote=")  # also where the configuration has one
    if found.train.precision:
        options.append(f"--train.precision={found.train.precision}")
    if not config:
        options = [f"--config={ROOT / 'configs/mnist.yaml'}", *options]
    gpus = f"#SBATCH --gpus-per-node={size.gpus}\n#SBATCH --cpus-per-task={4 * size.gpus}\n" if size.gpus else ""
    text = re.sub(r"#SBATCH --nodes=\d+\n", f"#SBATCH --nodes={size.nodes}\n{gpus}", text)
    text = text.replace("#SBATCH --job-name=naign", f"#SBATCH --job-name={name}")
    return text.replace('naign launch "$@"', f'naign launch {shlex.join(options)} "$@"').rstrip()


def predict(size: Size, *, data: str, config: Path | None) -> str:
    """A table of the estimated cost: a model (peak speeds times MFU, bytes over bandwidth), not a measurement."""
    import torch

    from pipeline.model.networks import build_network
    from pipeline.observe.speed import PEAKS, fit_flops, forward_flops

    peak = CPU_TFLOPS
    if size.gpus:
        names = {re.split(r"[ \-|\\]", pattern)[0].lower(): values for pattern, values in PEAKS.items()}
        if size.gpu.lower() not in names:
            raise InputError(f"--gpu {size.gpu} is not known: one of {', '.join(sorted(names))}")
        peak = names[size.gpu.lower()][0] or names[size.gpu.lower()][1]
    found = load(str(config or ROOT / "configs/mnist.yaml"))
    shape: tuple[int, ...] = (1, 28, 28)
    unknown, stored = "", 0
    use_endpoint(size.endpoint)
    try:
        with at_most(1):  # a cluster's bucket is often out of reach from here
            manifest = Manifest.load(data)
        shape, stored = manifest.shape, sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    except (InputError, Unavailable):
        unknown = f"\n{data} cannot be read from here: reckoned with images of 1x28x28"
    with torch.device("meta"):
        network = build_network(found.model, shape)
    parameters = sum(value.numel() for value in network.parameters())
    rate = peak * 1e12 * (MFU if size.gpus else 1.0)
    forward, ranks, images = forward_flops(network, shape), size.ranks, found.match.round * found.train.passes
    width = math.prod(shape)
    least = LAUNCH if size.gpus else 0.0
    generate = max(found.match.pool * forward / ranks / rate, least * found.match.pool / found.match.block / ranks)
    search = 2 * width * found.match.round * found.match.pool / ranks / rate
    fit = max(images * fit_flops(forward, found.objective.forwards) / ranks / rate, least * images / found.train.batch)
    exchanged = found.match.round * width * 4 + 16 * found.match.round * ranks
    averaged = images // found.train.batch * 2 * 4 * parameters
    messages = 0.0 if size.nodes == 1 else (exchanged + averaged) / (size.bandwidth * 1e9)
    rounds = -(-found.train.images // images)
    seconds = generate + search + fit + messages
    checkpoint = 4 * (4 if found.train.ema else 3) * parameters
    gpus, hours = size.nodes * size.gpus, rounds * seconds / 3600
    parts = f"generate {generate:.2g}, search {search:.2g}, fit {fit:.2g}, messages {messages:.2g}"
    rows = (
        ("GPUs" if gpus else "CPU hosts", f"{gpus} x {size.gpu}" if gpus else f"{size.nodes}"),
        ("network", f"{parameters / 1e6:.1f} M parameters, {forward / 1e9:.2f} GFLOP a forward"),
        ("data", f"{stored / 1e9:.2f} GB" if stored else "unknown"),
        ("a checkpoint", f"{checkpoint / 1e9:.3f} GB, {found.checkpoint.keep} kept"),
        ("a round", f"{seconds:.2g} s: {parts}"),
        ("the run", f"{rounds} rounds, {hours:.2g} h" + (f", {hours * gpus:.2g} GPU hours" if gpus else "")),
    )
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{wide}}  {text}" for name, text in rows) + (
        f"\nreckoned, not measured: {MFU:.0%} of the GPUs' peak and {size.bandwidth:g} GB/s between nodes; a rank has "
        f"at least {found.train.batch // ranks} images a step{unknown}"
    )
