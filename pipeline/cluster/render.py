"""Manifests and scripts for a job of any size, from those in k8s/ and launch/, and an estimate of what it costs."""

import hashlib
import json
import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline import shipped
from pipeline.config import Config, check, load, to_dict
from pipeline.data.mixing import open_manifest
from pipeline.errors import InputError, Unavailable, printable, require
from pipeline.storage import at_most, use_endpoint

DEFAULT = "mnist"  # in configs/
MFU = 0.3  # model FLOPs utilization: the share of a GPU's peak that training of convolutions reaches, by experience
LAUNCH = 2e-3  # seconds of kernel launches in a step, or a block of samples: the least that either takes on a GPU
CPU_TFLOPS = 0.1  # TFLOP/s of a host without GPUs: two or four cores of a server

_HOST, _PART = r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?", r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
# github.com/distribution/reference: [host[:port]/]name[:tag][@digest], in ASCII.
IMAGE = rf"({_HOST}(\.{_HOST})*(:\d{{1,5}})?/)?{_PART}(/{_PART})*(:\w[\w.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?"
# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html.
BUCKET = r"s3://(?![^/]*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?"
NAME = r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?"


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


def _check_options(*rules: tuple[str, str, str, str]) -> None:
    """InputError for the first (option, value, pattern, what it must be) whose value does not match."""
    for option, value, pattern, must in rules:
        if not (value.isprintable() and re.fullmatch(pattern, value, re.ASCII)):
            shown = re.sub(".*@", "...@", value, flags=re.DOTALL)  # without user and password
            raise InputError(f"{option} {printable(shown)}{must}")


def settings(size: Size, data: str, run: str, config: Path | None, name: str) -> Config:
    """The run's configuration. Raises InputError where it does not fit this size."""
    hosts, place = f"{size.nodes} nodes of {size.gpus} GPUs", rf"(?!.*://).*|{BUCKET}"
    require(
        (size.nodes >= 1 and size.gpus >= 0, f"{hosts}: at least one node, and no fewer than 0 GPUs"),
        (0 < size.bandwidth < 1e6, f"--bandwidth {size.bandwidth}: it must be positive, in GB/s"),
        (size.ranks <= 2**16, f"{hosts} are too many"),
    )
    _check_options(
        ("--name", name, NAME, ": small letters, digits and '-', at most 42, as Kubernetes wants names"),
        ("--data", data, place, ": write s3://bucket/prefix, a bucket's name as S3 wants it"),
        ("--run", run, place, ": write s3://bucket/prefix, a bucket's name as S3 wants it"),
    )
    found = load(str(config or DEFAULT))
    found.data.path, found.run.path, found.run.remote = data, run, ""
    if run.startswith("s3://"):
        found.run.path, found.run.remote = f"/run/naign/{name}", run.rstrip("/")
    if size.gpus and not found.train.precision:
        found.train.precision = "bf16"
    check(found)
    least = size.ranks * found.train.accumulate
    shared = f"train.batch={found.train.batch} cannot be shared by {size.ranks} ranks: in a --config set a multiple of"
    require((found.train.batch % least == 0, f"{shared} {least}, and match.round to a multiple of that"))
    return found


def render_k8s(size: Size, *, image: str, data: str, run: str, config: Path | None, name: str) -> str:
    """job.yaml for this size, for `kubectl apply -f -`, with a bucket instead of its S3 server."""
    found, bucket = settings(size, data, run, config, name), ": pods share a bucket only: give s3://bucket/prefix"
    account, address = size.account, ": it must be http://host:port or https://host, without user and password"
    _check_options(
        ("--data", data, "s3://.*", bucket),
        ("--run", run, "s3://.*", bucket),
        ("--image", image, IMAGE, " is no name of an image: [registry/]name[:tag][@digest]"),
        ("--service-account", account, r"([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?)?", " is no name of a service account"),
        ("--region", size.region, r"[a-z0-9-]+", " is no name of a region, as eu-west-1"),
        ("--endpoint", size.endpoint, r"(https?://[^\s@]+)?", address),
    )
    found.stop.within = 60
    access = f"the role of the service account {account}" if account else "the Secret naign-s3, if there is one"
    head = (
        f"# {name}: {size.nodes} pods {f'of {size.gpus} GPUs' if size.gpus else 'without GPUs'}\n"
        "#   apply     kubectl apply -f FILE      clean up  kubectl delete -f FILE, also before it is applied again\n"
        f"#   wait      kubectl wait --for=condition=Ready pod -l app.kubernetes.io/name={name} --timeout=30m\n"
        f"#   logs      kubectl logs -f -l app.kubernetes.io/name={name} --prefix --max-log-requests={size.nodes}\n"
        f"#   access    {access}\n"
    )
    objects = _fit(shipped("k8s/base/job.yaml").read_text(), size, image, found, name)
    return head + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, to be read and edited."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _fit(text: str, size: Size, image: str, config: Config, name: str) -> list[dict[str, Any]]:
    """The objects of job.yaml but those of its S3 server, with this name, size and configuration."""
    # No run's name has a dot, so that none can be that of another run's ConfigMap for its store.
    text = re.sub(r"\bname: naign-store(?![\w-])", f'name: "{name}.store"', text)
    text = re.sub(r"\b(name|subdomain): naign(?![\w-])", rf'\1: "{name}"', text)
    text = text.replace("naign-0.naign", f"{name}-0.{name}")
    every = yaml.safe_load_all(text)
    objects = [item for item in every if item["metadata"]["labels"]["app.kubernetes.io/name"] == name]
    store, run, _, job = objects
    store["data"] = {"AWS_REGION": size.region} | ({"AWS_ENDPOINT_URL": size.endpoint} if size.endpoint else {})
    run["data"]["run.yaml"] = yaml.safe_dump(to_dict(config), sort_keys=False)
    store["immutable"] = run["immutable"] = True
    # The API server then refuses a second `apply` under one name: replaced pods would read the other run's settings.
    digest = hashlib.sha256(json.dumps([store["data"], run["data"]]).encode()).hexdigest()
    job["spec"]["template"]["metadata"]["annotations"] = {"naign/config-sha256": digest}
    job["spec"]["completions"] = job["spec"]["parallelism"] = size.nodes
    pod = job["spec"]["template"]["spec"]
    (container,), volumes = pod["containers"], {volume["name"]: volume for volume in pod["volumes"]}
    container["image"] = image
    next(each for each in container["env"] if each["name"] == "NAIGN_HOSTS")["value"] = str(size.nodes)
    if size.account:
        pod["serviceAccountName"] = size.account
        del container["envFrom"][1]  # keys of a Secret would go before the role
    if gpus := size.gpus:
        volumes["shm"]["emptyDir"]["sizeLimit"] = f"{4 * gpus}Gi"
        container["command"][2:2] = ["--gpus", str(gpus)]
        container["resources"] = {
            "requests": {"cpu": str(3 * gpus), "memory": f"{12 * gpus}Gi"},
            "limits": {"nvidia.com/gpu": str(gpus), "memory": f"{32 * gpus}Gi"},
        }
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return objects


def render_slurm(size: Size, *, image: str, data: str, run: str, config: Path | None, name: str) -> str:
    """launch/slurm.sbatch for this size, for `sbatch`, with the options filled in. `image` is not used."""
    found = settings(size, data, run, config, name)
    remote, precision = found.run.remote, found.train.precision
    copied = f"/tmp/{re.sub(r'[^A-Za-z0-9.-]+', '-', remote.removeprefix('s3://'))}"
    options = [
        f"--config={config.resolve() if config and config.is_file() else config or DEFAULT}",
        f"--data.path={data}",
        f"--run.path={copied if remote else found.run.path}",
        f"--run.remote={remote}",  # also if that is empty: the configuration may have one
        *([f"--train.precision={precision}"] if precision else []),
    ]
    gpus = f"#SBATCH --gpus-per-node={size.gpus}\n#SBATCH --cpus-per-task={4 * size.gpus}\n" if size.gpus else ""
    text = shipped("launch/slurm.sbatch").read_text()
    text = re.sub(r"#SBATCH --nodes=\d+\n", f"#SBATCH --nodes={size.nodes}\n{gpus}", text)
    text = text.replace("#SBATCH --job-name=naign", f"#SBATCH --job-name={name}")
    return text.replace('naign launch "$@"', f'naign launch {shlex.join(options)} "$@"').rstrip()


def peaks_by_name() -> dict[str, tuple[float, ...]]:
    """PEAKS by the short names of --gpu; of a GPU that has several forms those of the first one, SXM."""
    from pipeline.observe.speed import PEAKS

    names = dict[str, tuple[float, ...]]()
    for pattern, values in PEAKS.items():
        names.setdefault(re.split(r"[ \-|\\]", pattern.replace("GeForce RTX ", "RTX"))[0].lower(), values)
    return names


def predict(size: Size, *, data: str, config: Path | None) -> str:
    """A table of the estimated cost: a model (peak speeds times MFU, bytes over bandwidth), not a measurement."""
    import torch

    from pipeline.model.networks import build_network
    from pipeline.observe.speed import fit_flops, forward_flops

    peak = CPU_TFLOPS
    if size.gpus:
        names = peaks_by_name()
        require((size.gpu.lower() in names, f"--gpu {size.gpu} is not known: one of {', '.join(sorted(names))}"))
        peak = names[size.gpu.lower()][0] or names[size.gpu.lower()][1]
    found, unknown, stored = load(str(config or DEFAULT)), "", 0
    shape: tuple[int, ...] = (1, 28, 28)
    use_endpoint(size.endpoint)
    try:
        with at_most(1):  # a cluster's bucket is often out of reach from here
            manifest, shape = open_manifest(replace(found.data, path=data))
        stored = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    except (InputError, Unavailable):
        unknown = f"\n{data} cannot be read from here: reckoned with images of 1x28x28"
    with torch.device("meta"):
        network = build_network(found.model, shape)
    parameters, width, ranks = sum(value.numel() for value in network.parameters()), math.prod(shape), size.ranks
    forward, match, train = forward_flops(network, shape), found.match, found.train
    images, speed = match.round * train.passes, peak * 1e12 * (MFU if size.gpus else 1.0) * ranks  # of all ranks
    least = LAUNCH if size.gpus else 0.0
    generate = max(match.pool * forward / speed, least * match.pool / match.block / ranks)
    search = 2 * width * match.round * match.pool / speed
    fit = max(images * fit_flops(forward, found.objective.forwards) / speed, least * images / train.batch)
    sent = match.round * (width * 4 + 16 * ranks) + images // train.batch * 2 * 4 * parameters  # bytes
    messages = 0.0 if size.nodes == 1 else sent / (size.bandwidth * 1e9)
    rounds, seconds = -(-train.images // images), generate + search + fit + messages
    gpus, hours = size.nodes * size.gpus, rounds * seconds / 3600
    parts = f"generate {generate:.2g}, search {search:.2g}, fit {fit:.2g}, messages {messages:.2g}"
    checkpoint = 4 * (4 if train.ema else 3) * parameters
    rows = (
        ("GPUs" if gpus else "CPU hosts", f"{gpus} x {size.gpu}" if gpus else f"{size.nodes}"),
        ("network", f"{parameters / 1e6:.1f} M parameters, {forward / 1e9:.2f} GFLOP a forward"),
        ("data", f"{stored / 1e9:.2f} GB" if stored else "unknown"),
        ("a checkpoint", f"{checkpoint / 1e9:.3f} GB, {found.checkpoint.keep} kept"),
        ("a round", f"{seconds:.2g} s: {parts}"),
        ("the run", f"{rounds} rounds, {hours:.2g} h{f', {hours * gpus:.2g} GPU hours' if gpus else ''}"),
    )
    return "\n".join(f"{name:12}  {text}" for name, text in rows) + (
        f"\nreckoned, not measured: {MFU:.0%} of the GPUs' peak and {size.bandwidth:g} GB/s between nodes; a rank has "
        f"at least {train.batch // ranks} images a step{unknown}"
    )
