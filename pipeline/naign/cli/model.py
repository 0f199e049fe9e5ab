"""Commands that use a trained model: evaluate, sample, restore, score, export, demo."""

import csv
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from naign import shipped
from naign.errors import InputError, require
from naign.terminal import busy, counted

if TYPE_CHECKING:
    from naign.model.naign import NAIGN

Device = Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(help="Where to compute.")]
Times = Annotated[int, tyro.conf.arg(help="How often f is applied.")]
_RUN = "The folder of a run (or s3://), a checkpoint or an exported model"
Run = Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help=f"{_RUN}.")]
_MODEL = f"{_RUN}; hf://user/model on Hugging Face; or mnist, which comes with naign, where no path has that name"
Model = Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help=f"{_MODEL}.")]
Played = Annotated[
    Positional[str],
    tyro.conf.arg(metavar="[RUN]", help=f"{_MODEL}.", help_behavior_hint="(default: mnist, as it comes with naign)"),
]
Files = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(help="Images, or folders of them.")]


NO_BANK = "this model has no bank of codes, which is filled once a prior is fitted to codes: energies alone"
EXPORTED = {"model.safetensors", "config.json"}  # files that an export writes, and may replace
Steps = Annotated[
    int | None,
    tyro.conf.arg(help="Of a flow from noise to a code (prior.steps); default: as trained."),
]
Guidance = Annotated[
    float | None,
    tyro.conf.arg(help="Its strength (prior.guidance), of a flow trained with any; default: as trained."),
]


def evaluate(
    run: Run,
    /,
    *,
    data: str | None = None,
    samples: int = 10_000,
    encoder: str | None = None,
    fid: str | None = None,
    fid_samples: int = 50_000,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Measure a trained model: evaluation/ in its folder gets metrics.json, report.html and pictures.

    Args:
        data: Packed data set; default: the one it was trained on.
        samples: How many samples to draw; distances of different counts do not compare.
        encoder: A second encoder for Frechet distances: efficientnet-lite0 to -lite2, timm:NAME, a .safetensors file;
            default: efficientnet-lite2 for images of 3 channels.
        fid: Also FID and KID against the training images, on Inception with the weights of this file; `download`: those
            of torch-fidelity's release.
        fid_samples: How many samples FID is of; papers take 50,000.
        seed: The same seed draws the same latents and damages.
    """
    from naign.evaluate.recorded import folder_of
    from naign.evaluate.report import compared, number
    from naign.evaluate.run import evaluate as measure

    _check(seed=seed)
    metrics = measure(
        run,
        data=data,
        samples=samples,
        seed=seed,
        device=_find_device(device),
        encoder=encoder,
        fid=fid,
        fid_samples=fid_samples,
    )
    _name_checkpoint(run, metrics["checkpoint"])
    for fd in ({"encoder": metrics["encoder"]} | metrics["fd"], metrics["second"]):
        if fd:
            values = f"{compared(fd, 'once'):.4g} for f(z); floor {fd['floor']:.4g} (training against test)"
            times = f"f(z) is {number(fd['once_ratio'])} times that"
            if fd["noise"] is not None:
                times += f", f of noise {number(fd['noise_ratio'])} times"
            print(f"Frechet distance on {fd['encoder']}: {values}; {times}")
    if found := metrics["inception"]:
        sizes = f"{found['samples']:,} f(z) against {found['train']:,} training images"
        print(f"FID {found['fid']:.4g}, KID {found['kid']:.3g} ± {found['kid_deviation']:.1g}: {sizes}")
    for kind, errors in (metrics["restoration"] or {}).items():
        print(f"restoration of {kind}: mean absolute error {errors['input']:.3f} before, {errors['once']:.3f} after")
    for text in metrics["warnings"]:
        print(f"warning: {text}")
    for text in metrics["notes"]:
        print(f"note: {text}")
    print(f"report: {folder_of(run)}/evaluation/report.html")


def sample(
    run: Model,
    /,
    *,
    n: int = 64,
    to: Path | None = None,
    label: str | None = None,
    latents: Literal["prior", "noise"] | None = None,
    times: Times = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Draw samples into one picture, or into a PNG each where --to is a folder (points: a .csv file).

    Args:
        n: How many.
        to: A .png file for a grid, a .csv file for points, or a folder for one PNG a sample.
        label: Name or number of a class, of a model with prior.classes; default: classes as frequent as in training.
        latents: What f is applied to: decoded codes of the prior, or noise; default: the prior's, if there is one.
        seed: The same seed draws the same latents, and so the same samples.
    """
    from naign.cli.files import write_samples

    _check(n=n, times=times, seed=seed, to=to)
    model = _open_with(run, _find_device(device), steps=steps, guidance=guidance)
    with counted("sampling", total=n, unit="sample") as bar:
        samples = model.sample(
            n,
            seed=seed,
            label=label,
            latents=latents or "",
            times=times,
            advance=bar.update,
        ).cpu()
    if to is None:
        to = Path("samples.png" if samples.ndim == 4 else "samples.csv")
    print(f"{n} samples: {write_samples(samples, to)}")


def restore(
    run: Model,
    files: Files,
    /,
    *,
    to: Path = Path("restored"),
    times: Annotated[int | None, tyro.conf.arg(help="How often f is applied; default: 1, with --mask 8.")] = None,
    mask: Path | None = None,
    size: Literal["picture", "model"] | None = None,
    device: Device = "auto",
) -> None:
    """Repair images: one PNG for each file, in tiles of the model's size or resized to it, see --size.

    Args:
        to: Folder to write; images in folders keep sub-folders and names. For one image also a .png or .jpg file.
        mask: Fill holes: a picture of the images' size, white where a hole is. All other pixels stay as they are.
        size: Of what is written: the picture's, in tiles, or the model's, the default if f has one code for a picture.
    """
    from naign.cli.repair import restore_files

    _check(times=times, to=to)
    model = _open(run, _find_device(device))
    restore_files(
        model,
        files,
        to=to,
        times=times,
        mask=mask,
        size=size,
    )


def score(
    run: Model,
    files: Files,
    /,
    *,
    times: Times = 1,
    map: bool = False,
    refused: float = 0.05,
    device: Device = "auto",
) -> None:
    """Print as CSV how unlike the training data each file is: the energy, which is the mean of (f(x) - x)^2, and the
    distance of its code to the nearest one of training images; the share of training images with less; and whether
    both together are beyond most of them.

    Args:
        refused: Share of training images that would be called unlike.
        map: Also write the map of |f(x) - x| beside each picture, as grey photo.png.map.png of its size: black is 0,
            white 1 or more. It and the energy are then computed at that size, in tiles of the model's.
    """
    from naign.cli.repair import score_files

    _check(times=times)
    require((0 <= refused <= 1, f"--refused is {refused}: give a share of the training images, from 0 to 1"))
    model = _open(run, _find_device(device))
    rows = score_files(
        model,
        files,
        times=times,
        map=map,
        refused=refused,
    )
    if not model.has_bank and not map:
        print(NO_BANK, file=sys.stderr)
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


def export(
    run: Model,
    /,
    *,
    to: Path,
    dtype: Literal["float32", "float16"] | None = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> None:
    """Export a model as safetensors, for NAIGN.from_pretrained.

    Args:
        to: Folder to write.
        dtype: Of the weights in model.safetensors, which are float32 again when they are read; default: as they are.
    """
    _check(to=to)
    file = to / "model.safetensors"
    others = {path.name for path in to.glob("*")} - EXPORTED
    itself = to.resolve() == Path(run.removesuffix(file.name)).resolve()
    require(
        (not others, f"--to {to} holds more than an export, such as {sorted(others)[:1]}: give another folder"),
        (not itself, f"--to {to} is the model itself: give another folder"),
    )
    model = _open_with(run, "cpu", steps=steps, guidance=guidance)
    if dtype:
        model.metadata["dtype"] = dtype
    with busy("exporting"):
        model.save_pretrained(to)
    print(f"exported: {file}")


def demo(
    run: Played = "",
    /,
    *,
    port: int = 7860,
    device: Device = "auto",
) -> None:
    """Serve a page to play with a model of images: draw or upload, damage, repair; sample. Without RUN
    the model is the one that comes with naign, of MNIST's digits.

    Args:
        port: Port of 127.0.0.1 to listen on; 0 for any free one. Other machines cannot reach it.
    """
    require((0 <= port < 2**16, f"--port is {port}: it must be 0 to {2**16 - 1}"))
    shown = run or "mnist"
    model = _open(run or str(shipped("models/mnist")), _find_device(device))
    require((len(model.shape) == 3, f"the page is for images, the model in {shown} takes points of {model.shape}"))
    size = " × ".join(map(str, model.shape))
    does = f"f turns an image of {size} into one like its training data"
    about = f"# {shown}\n\n{does}. The energy of an image is how much f changes it."
    with tempfile.TemporaryDirectory(prefix="naign-demo-") as place:
        # Read when Gradio is imported: nothing is sent, and its files are gone in the end.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": place}
        try:
            from naign.cli.demo_page import serve
        except ModuleNotFoundError as error:
            raise InputError(f"naign demo needs Gradio ({error}): in a checkout, pip install -e '.[demo]'") from None
        serve(model, about=about, port=port)


def _open(run: str, device: str) -> "NAIGN":
    """Read a model. Of a run, print on stderr which checkpoint it is."""
    from naign.model.naign import NAIGN

    with busy(f"reading {run}"):
        model = NAIGN.from_pretrained(run, device=device)
    _name_checkpoint(run, model.checkpoint)
    return model


def _name_checkpoint(run: str, name: str | None) -> None:
    if name:
        print(f"{run}: the newest checkpoint, {name}", file=sys.stderr)


def _open_with(run: str, device: str, **settings: float | None) -> "NAIGN":
    """The model with its own prior, or with other settings of a flow where they are given."""
    from naign.model.naign import warn_if_unfitted

    model = _open(run, device)
    chosen = {name: value for name, value in settings.items() if value is not None}
    if chosen:
        model = model.with_flow(**chosen)
    warn_if_unfitted(model, run)
    return model


def _find_device(name: Device) -> str:
    from naign.distributed.host import count_gpus, keep_memory, why_unfit

    keep_memory()  # page faults of new tensors took a quarter of the time of sampling
    if name == "cpu" or name == "auto" and not count_gpus():
        return "cpu"
    problem = "--device cuda: this machine has no CUDA device that torch can use; try --device cpu"
    if count_gpus():
        problem = why_unfit()
    require((not problem, problem))
    return "cuda"


def _check(
    *,
    seed: int = 0,
    to: Path | None = None,
    **counts: int | None,
) -> None:
    """Raise InputError for a seed that no generator takes, an address as a folder to write, and counts below 1."""
    require((":/" not in str(to), f"{to} is an address, and only a local folder is written: give one, then copy it"))
    require((0 <= seed < 2**63, f"--seed is {seed}: it must be 0 to {2**63 - 1}"))
    for name, value in counts.items():
        allowed = value is None or 1 <= value < 2**53
        require((allowed, f"--{name} is {value}: it must be at least 1, and no more than memory holds"))
