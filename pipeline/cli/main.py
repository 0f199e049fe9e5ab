"""`naign pack | index | verify | launch | render | fetch | evaluate | sample | restore | score | export | doctor`.

Each function is a command. Options, help and their types are the functions' signatures. Heavy imports wait until a
command needs them.
"""

import csv
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from pipeline.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from pipeline.data.format.manifest import Manifest

Device = Literal["auto", "cpu", "cuda"]
Kind = Literal["blur", "noise", "salt_pepper", "rows"]
Run = Annotated[Positional[str], tyro.conf.arg(help="A run (or s3://), a checkpoint or an exported model: its folder.")]
Files = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(help="Images (points: .csv files), or folders of them.")]


def pack(
    source: Positional[str],
    /,
    *,
    to: str,
    root: Path | None = None,
    size: int | None = None,
    channels: Literal[1, 3] = 3,
    shards: int | None = None,
    encoding: Literal["png", "jpg", "webp", "npy"] = "png",
    train: int | None = None,
    without: tuple[str, ...] = (),
    seed: int = 0,
    force: bool = False,
) -> None:
    """Pack a data set into WebDataset shards with an index.json.

    Args:
        source: mnist, fashion_mnist, cifar10, digits, toy2d:<name> or folder.
        to: Folder or s3://bucket/prefix to write.
        root: Files to use instead of fetching them; for folder, the tree of images (sub-folders are labels).
        size: Pixels a side, for folder: images are resized, cropped to a square, transparency laid on white.
        channels: For folder: 3 colour, 1 grey.
        shards: Shards a split; default 16, more for large data.
        encoding: How images are stored: png and webp keep every bit, jpg is smaller, npy is read fastest.
        train: Keep only so many training examples, drawn by the seed; the test split stays whole.
        without: Labels to leave out of the training split.
        seed: Of the order in which samples are dealt to shards, and of what is drawn.
        force: Replace a data set that is there.
    """
    from pipeline.data.format import writer
    from pipeline.data.sources.catalog import load
    from pipeline.data.sources.source import subset
    from pipeline.evaluate import NEIGHBOURS

    loaded = load(source, root=root, size=size, channels=channels, seed=seed)
    manifest, written = writer.pack(
        subset(loaded, train=train, without=without, seed=seed) if train is not None or without else loaded,
        to,
        shards=shards,
        encoding=encoding,
        seed=seed,
        force=force,
    )
    print(f"{_contents(to, manifest)}{'' if written else ' (already there)'}")
    if (tests := manifest.split("test").samples) <= NEIGHBOURS:
        print(f"note: too few test examples to evaluate a network on: {tests}, and more than {NEIGHBOURS} are needed")


def index(
    path: Positional[str],
    /,
    *,
    train: str | None = None,
    test: str | None = None,
    labels: Path | None = None,
    name: str | None = None,
    keep_broken: bool = False,
    force: bool = False,
) -> None:
    """Make the index.json and page tables of WebDataset tars that others wrote; reads every byte, changes no tar.

    Args:
        path: Folder or s3://bucket/prefix of the tars. Their samples must be alike: pictures of one size, or points.
        train: Which of them are for training, as a pattern like 'imagenet-train-*.tar'; default: those not for testing.
        test: Which are for testing; default: those with test or val in their names.
        labels: File with a label name a line, for the numbers in .cls; default: the numbers themselves.
        name: Of the data set; default: the last part of the path.
        keep_broken: Of samples that cannot be decoded only warn; train with --data.broken=skip.
        force: Replace an index.json that is there.
    """
    from pipeline.data.format.audit import index as read_all

    try:
        names = tuple(labels.read_text().splitlines()) if labels else ()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels {labels}: {error}") from None
    manifest = read_all(path, train=train, test=test, labels=names, name=name, keep_broken=keep_broken, force=force)
    print(_contents(path, manifest))


def _contents(path: str, manifest: "Manifest") -> str:
    counts = (f"{split.samples} {name} in {len(split.shards)} shards" for name, split in manifest.splits.items())
    return f"{path}: {manifest.name} {'x'.join(map(str, manifest.shape))}, {', '.join(counts)}"


def verify(path: Positional[str], /) -> None:
    """Check a data set against its index.json: sizes, hashes, page tables, tar structure, pixels, labels, keys.

    Args:
        path: Folder or s3://bucket/prefix of shards.
    """
    from pipeline.data.format.audit import verify as read_all

    report = read_all(path)
    print(f"{path}: sound, {report.samples} samples in {report.shards} shards, {report.bytes / 1e6:.1f} MB")


def evaluate(
    run: Run,
    /,
    *,
    data: str | None = None,
    samples: int = 10_000,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Measure a trained model; writes evaluation/metrics.json, pictures and report.html into its folder.

    Args:
        data: Packed data set; default: the one it was trained on.
        samples: How many samples to draw; distances of different counts do not compare.
        seed: The same seed draws the same latents and damages.
        device: Where to compute.
    """
    from pipeline.evaluate.run import evaluate as measure

    _check_seed(seed)
    metrics = measure(run, data=data, samples=samples, seed=seed, device=_device(device))
    fd = metrics["fd"]
    print(
        f"Frechet distance on {metrics['encoder']}: {fd['once']:.4g} for f(z), {fd['twice']:.4g} for f(f(z)); floor "
        f"(training against test) {fd['floor']:.4g}"
    )
    for kind, errors in (metrics["restoration"] or {}).items():
        print(f"restoration of {kind}: mean absolute error {errors['input']:.3f} before, {errors['once']:.3f} after")
    for note in metrics["notes"]:
        print(f"note: {note}")
    place = run.rstrip("/") if not Path(run).is_file() else Path(run).parent
    print(f"report: {place}/evaluation/report.html")


def sample(
    run: Run,
    /,
    *,
    n: int = 64,
    to: Path | None = None,
    times: int = 1,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Draw samples: one picture of all, or with a folder as --to one PNG each (points: a .csv file).

    Args:
        n: How many.
        to: A .png file for a grid, a .csv file for points, or a folder for one PNG a sample.
        times: How often f is applied.
        seed: The same seed draws the same latents, and so the same samples.
        device: Where to compute.
    """
    from pipeline.cli.files import write_samples
    from pipeline.model.naign import NAIGN

    _at_least(1, n=n, times=times)
    _check_seed(seed)
    made = NAIGN.from_pretrained(run, device=_device(device)).sample(n, seed=seed, times=times).cpu()
    place = to or Path("samples.png" if made.ndim == 4 else "samples.csv")
    print(f"{n} samples: {write_samples(made, place)}")


def restore(
    run: Run,
    files: Files,
    /,
    *,
    to: Path = Path("restored"),
    times: int = 1,
    damage: Kind | None = None,
    device: Device = "auto",
) -> None:
    """Repair images: writes one PNG a file into a folder, at the model's size (points: from .csv to .csv files).

    Args:
        to: Folder to write; images found in folders keep their sub-folders and names.
        times: How often f is applied.
        damage: Damage the images first (the damaged ones go to a sub-folder of that name), to see what a repair does.
        device: Where to compute.
    """
    import torch

    from pipeline.cli.files import find_files, read_samples, refuse_overwriting, save, write_samples
    from pipeline.data.degrade import degrade
    from pipeline.model.naign import NAIGN
    from pipeline.observe.pictures import to_image

    _at_least(1, times=times)
    model = NAIGN.from_pretrained(run, device=_device(device))
    if to.is_file():
        raise InputError(f"--to {to} is a file: give a folder, for one picture an image")
    points = len(model.shape) == 1
    if points and damage:
        raise InputError(f"--damage {damage} is for images, this model takes points")
    inputs = find_files(files, model.shape)
    outputs = [to / name.with_suffix(".csv" if points else ".png") for _, name in inputs]
    paths = [path for path, _ in inputs]
    places = [to / damage / output.relative_to(to) for output in outputs] if damage else []
    refuse_overwriting(paths * (2 if damage else 1), outputs + places)
    given = read_samples(paths, model.shape)
    damaged = degrade(torch.cat(given), damage) if damage else torch.cat(given)
    sizes = [len(batch) for batch in given]
    made = list(zip(outputs, model.project(damaged, times=times).cpu().split(sizes), strict=True))
    if damage:
        made += zip(places, damaged.split(1), strict=True)
    for place, samples in made:
        place.parent.mkdir(parents=True, exist_ok=True)
        if points:
            write_samples(samples, place)
        else:
            save(to_image(samples[0]), place)
    print(f"{len(outputs)} restored {'files of points' if points else 'images'}: {to}/")


def score(
    run: Run,
    files: Files,
    /,
    *,
    device: Device = "auto",
) -> None:
    """Print energies as CSV: file (points: file:line), mean squared residual of f(x) - x. Low near the data trained on.

    Args:
        device: Where to compute.
    """
    import torch

    from pipeline.cli.files import find_files, read_samples
    from pipeline.model.naign import NAIGN

    model = NAIGN.from_pretrained(run, device=_device(device))
    paths = [path for path, _ in find_files(files, model.shape)]
    given = read_samples(paths, model.shape)
    lines = [(path, line) for path, batch in zip(paths, given, strict=True) for line in range(1, 1 + len(batch))]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("file", "energy"))
    for (path, line), energy in zip(lines, model.energy(torch.cat(given)).tolist(), strict=True):
        table.writerow((path if len(model.shape) == 3 else f"{path}:{line}", f"{energy:.6g}"))


def export(
    run: Run,
    /,
    *,
    to: Path,
    format: Literal["safetensors", "torch"] = "safetensors",
) -> None:
    """Write a model alone, for use elsewhere: safetensors for NAIGN.from_pretrained, torch for torch.export.load.

    Args:
        to: Folder to write.
        format: safetensors, or an exported program (f of a batch of any size) that needs no code of this project.
    """
    import torch

    from pipeline.model.naign import NAIGN
    from pipeline.storage.local import write_atomically

    model = NAIGN.from_pretrained(run)
    if format == "safetensors":
        print(f"exported: {model.save_pretrained(to)}")
        return
    to.mkdir(parents=True, exist_ok=True)
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(model.network, (torch.zeros(2, *model.shape),), dynamic_shapes=(batch,))
    content = io.BytesIO()
    torch.export.save(program, content)
    write_atomically(to / "model.pt2", content.getvalue())
    print(f"exported: {to / 'model.pt2'}")


def doctor() -> None:
    """Say what this machine offers and what stands in the way: versions, devices, threads, memory, one FAISS build."""
    from pipeline.observe.doctor import examine

    problems = examine(print)
    if problems:
        raise InputError("\n  ".join(["this machine is not ready:", *problems]))
    print("ready")


def fetch(remote: Positional[str], /, *, to: Path, every: float = 0) -> None:
    """Copy what a run in a bucket reports (metrics, TensorBoard, pictures) into a folder.

    Args:
        remote: s3://bucket/prefix of the run.
        to: Folder to copy into.
        every: Seconds after which to look for more, again and again; 0: once.
    """
    import time

    from pipeline.checkpoint.bucket import fetch_shown
    from pipeline.errors import Unavailable
    from pipeline.storage.store import open_store

    if not (every == 0 or 1 <= every <= 86400) or str(to) in ("", "."):
        raise InputError("--every must be 0 or 1 to 86400 seconds, --to a folder of its own")
    while True:
        try:
            if not every and not open_store(remote).exists("config.yaml"):
                raise InputError(f"{remote} holds no run: its config.yaml is not there")
            print(f"{fetch_shown(remote, to, renew=True)} files from {remote}", flush=True)
        except (InputError, Unavailable) as error:
            if not every:
                raise
            print(f"naign fetch: {error}", file=sys.stderr, flush=True)
        if not every:
            return
        time.sleep(every)


def launch() -> None:
    """Start this host's ranks of a training, under Kubernetes, Kubeflow, Slurm or alone (naign launch --help)."""
    from pipeline.cluster.launch import main

    code = main(sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end gives signals back their power to kill, and waits for threads


def render(
    what: Positional[Literal["k8s", "slurm"]],
    /,
    *,
    data: str,
    run: str,
    nodes: int = 1,
    gpus: int = 1,
    image: str = "naign:cuda",
    config: Path | None = None,
    gpu: str = "h100",
    bandwidth: float = 10.0,
    name: str = "",
    service_account: str = "",
    endpoint: str = "",
    region: str = "us-east-1",
) -> None:
    """Print the manifests, or the Slurm script, of a training of a given size; what it will cost goes to stderr.

    Args:
        what: k8s for kubectl apply -f -, slurm for sbatch.
        data: Packed data: s3://bucket/prefix, or for Slurm a shared folder.
        run: Where the run is kept: s3://bucket/prefix, or for Slurm a shared folder.
        nodes: Machines.
        gpus: GPUs of each; 0 trains on CPUs.
        image: Of launch/Dockerfile (k8s).
        config: Settings of the run; default: those of configs/mnist.yaml.
        gpu: Which, for the prediction: h100, h200, a100, l4, ...
        bandwidth: GB/s between nodes, for the prediction.
        name: Of the Job, its Service and its ConfigMaps; default: the last part of --run, made to fit.
        service_account: Of the pods, where a role instead of a Secret gives access to the bucket (k8s).
        endpoint: Address of the S3 server, where it is not AWS's (k8s).
        region: Of the bucket (k8s).
    """
    from pipeline.cluster.render import Size, name_after, predict, render_k8s, render_slurm

    size = Size(
        nodes=nodes,
        gpus=gpus,
        gpu=gpu,
        bandwidth=bandwidth,
        account=service_account,
        endpoint=endpoint,
        region=region,
    )
    make = render_k8s if what == "k8s" else render_slurm
    text = make(size, image=image, data=data, run=run, config=config, name=name or name_after(run))
    if data.startswith("s3://"):
        print(f"reading {data}", file=sys.stderr, flush=True)
    cost = predict(size, data=data, config=config)
    print(text)
    print(cost, file=sys.stderr)


def main() -> None:
    if sys.argv[1:2] == ["launch"]:  # what it does not know is for the training program
        launch()
    commands = (pack, index, verify, launch, render, fetch, evaluate, sample, restore, score, export, doctor)
    with exit_on_input_error("naign"):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # of a file's name that the terminal cannot show
        try:
            tyro.extras.subcommand_cli_from_dict(
                {command.__name__: command for command in commands},
                prog="naign",
                description="Non-adversarial idempotent generative networks: one network that generates and repairs.",
            )
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has had enough, as `head`; nothing is left to flush at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            if error.filename is None:
                raise
            raise InputError(f"{error.filename}: {error.strerror}") from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise InputError("this machine has too little memory for that: ask for fewer or smaller ones") from None
            raise


def _device(name: Device) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device that torch can use; try --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}: it must be 0 to {2**63 - 1}")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise InputError(f"--{name} is {value}: it must be at least {least}")


if __name__ == "__main__":
    main()
