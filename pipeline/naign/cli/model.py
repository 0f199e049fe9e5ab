"""Commands that use a trained model: evaluate, sample, restore, score, export, push, demo."""

import csv
import os
import sys
import tempfile
from dataclasses import dataclass
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
Kind = Literal["blur", "noise", "salt_pepper", "rows"]
_RUN = "The folder of a run (or s3://), a checkpoint or an exported model"
Run = Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help=f"{_RUN}.")]
_MODEL = f"{_RUN}; hf://user/model on Hugging Face; or mnist, which comes with naign, where no path has that name"
Model = Annotated[Positional[str], tyro.conf.arg(metavar="RUN", help=f"{_MODEL}.")]
Played = Annotated[
    Positional[str],
    tyro.conf.arg(metavar="[RUN]", help=f"{_MODEL}.", help_behavior_hint="(default: mnist, as it comes with naign)"),
]
Files = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(help="Images, or folders of them.")]


@dataclass(frozen=True)
class Latents:
    """Options that say where z comes from; their comments are their help."""

    # What z is drawn from: the run's prior, or a Gaussian mixture fitted to codes of its training images.
    prior: Literal["trained", "gmm"] = "trained"
    components: int = 50  # Gaussians of --prior gmm.
    # Steps of a flow from noise to a code (prior.steps); default: as trained.
    steps: int | None = None
    # Strength of guidance by classes (prior.guidance); default: as trained.
    guidance: float | None = None


TRAINED = Latents()
Drawn = Annotated[Latents, tyro.conf.arg(name="")]


def evaluate(
    run: Run,
    /,
    *,
    data: str | None = None,
    samples: int = 10_000,
    encoder: str | None = None,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Measure a trained model: evaluation/ in its folder gets metrics.json, report.html and pictures.

    Args:
        data: Packed data set; default: the one it was trained on.
        samples: How many samples to draw; distances of different counts do not compare.
        encoder: A second encoder for Frechet distances: efficientnet-lite0 to -lite2, timm:NAME, a .safetensors file;
            default: efficientnet-lite2 for images of 3 channels.
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
    )
    _name_checkpoint(run, metrics["checkpoint"])
    for fd in ({"encoder": metrics["encoder"]} | metrics["fd"], metrics["second"]):
        if fd:
            values = f"{compared(fd, 'once'):.4g} for f(z); floor {fd['floor']:.4g} (training against test)"
            times = f"f(z) is {number(fd['once_ratio'])} times that"
            if fd["noise"] is not None:
                times += f", f of noise {number(fd['noise_ratio'])} times"
            print(f"Frechet distance on {fd['encoder']}: {values}; {times}")
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
    times: Times = 1,
    latents: Drawn = TRAINED,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Draw samples into one picture, or into a PNG each where --to is a folder (points: a .csv file).

    Args:
        n: How many.
        to: A .png file for a grid, a .csv file for points, or a folder for one PNG a sample.
        label: Name or number of a class, of a model with prior.classes; default: classes as frequent as in training.
        seed: The same seed draws the same latents, and so the same samples.
    """
    from naign.cli.files import write_samples

    _check(n=n, times=times, seed=seed, to=to)
    model = _open_with(latents, run, _find_device(device))
    with counted("sampling", total=n, unit="sample") as bar:
        samples = model.sample(n, seed=seed, label=label, times=times, advance=bar.update).cpu()
    if to is None:
        to = Path("samples.csv")
        if samples.ndim == 4:
            to = Path("samples.png")
    print(f"{n} samples: {write_samples(samples, to)}")


def restore(
    run: Model,
    files: Files,
    /,
    *,
    to: Path = Path("restored"),
    times: Annotated[int | None, tyro.conf.arg(help="How often f is applied; default: 1, with --mask 8.")] = None,
    damage: Kind | None = None,
    mask: Path | None = None,
    size: Literal["picture", "model"] | None = None,
    device: Device = "auto",
) -> None:
    """Repair images: one PNG for each file, in tiles of the model's size or resized to it, see --size.

    Args:
        to: Folder to write; images in folders keep sub-folders and names. For one image also a .png or .jpg file.
        damage: Damage the images first (the damaged ones go to a sub-folder of that name), to see what a repair does.
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
        damage=damage,
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
    device: Device = "auto",
) -> None:
    """Print the energy of each file as CSV: the mean of (f(x) - x)^2, low near training data.

    Args:
        map: Also write the map of |f(x) - x| beside each picture, as grey photo.png.map.png of its size: black is 0,
            white 1 or more. It and the energy are then computed at that size, in tiles of the model's.
    """
    from naign.cli.repair import score_files

    _check(times=times)
    model = _open(run, _find_device(device))
    energies = score_files(model, files, times=times, map=map)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("file", "energy"))
    for place, energy in energies:
        table.writerow((place, f"{energy:.6g}"))


def export(
    run: Model,
    /,
    *,
    to: Path,
    dtype: Literal["float32", "float16"] | None = None,
    latents: Drawn = TRAINED,
) -> None:
    """Export a model as safetensors, for NAIGN.from_pretrained.

    Args:
        to: Folder to write.
        dtype: Of the weights in model.safetensors, which are float32 again when they are read; default: as they are.
    """
    _check(to=to)
    file = to / "model.safetensors"
    place = to.resolve()
    itself = place == Path(run.removesuffix(file.name)).resolve()
    taken = file.exists() and (itself or (to / "README.md").exists())
    within = (to / "manifest.json").exists()
    for folder in (place, *place.parents):
        within = within or (folder / "checkpoints").exists() and (folder / "config.yaml").exists()
    require(
        (not within, f"--to {to} is a run or a checkpoint, or in one: give another folder"),
        (not taken, f"--to {to} is the model itself, or another with a card: give another folder"),
    )
    model = _open_with(latents, run, "cpu")
    if dtype:
        model.metadata["dtype"] = dtype
    with busy("exporting"):
        model.save_pretrained(to)
    print(f"exported: {file}")


def push(
    run: Run,
    name: Positional[str],
    /,
    *,
    private: bool = False,
    license: str | None = None,
    dry_run: Path | None = None,
) -> None:
    """Upload a model to the Hugging Face hub, with a card written from its evaluation (`naign evaluate` first).

    Args:
        name: Repository on the Hugging Face hub: user/model. With --dry-run any name, which the card states.
        private: A new repository is private; without it, as the account has it by default.
        license: Licence of the weights, as the hub abbreviates it, such as apache-2.0; default: the card states none.
        dry_run: Write what would be uploaded into this folder, and upload nothing.
    """
    from naign.evaluate.card import write_repository
    from naign.model import files as model_files

    _check(to=dry_run)
    if dry_run is None:
        model_files.check_login(name)
    model = _open(run, "cpu")
    if dry_run:
        files = write_repository(dry_run, model, run, name=name, license=license)
        print(f"wrote {files} files to {dry_run}/, uploaded nothing")
        return
    with tempfile.TemporaryDirectory() as place:
        write_repository(Path(place), model, run, name=name, license=license)
        address = model_files.upload(Path(place), name, private=private)
    print(f"uploaded: {address}")


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
    about = f"# {shown}\n\nf turns an image of {size} into one like its training data."
    about += " The energy of an image is how much f changes it."
    with tempfile.TemporaryDirectory(prefix="naign-demo-") as place:
        # Read when Gradio is imported: nothing is sent, and its files are gone in the end.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": place}
        try:
            from naign.cli.demo_page import Player, serve
        except ModuleNotFoundError as error:
            raise InputError(f"naign demo needs Gradio ({error}): in a checkout, pip install -e '.[demo]'") from None
        serve(Player(model), about=about, port=port)


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


def _open_with(latents: Latents, run: str, device: str) -> "NAIGN":
    """The model with its own prior, with other settings of it where they are given, or with a mixture."""
    _check(components=latents.components)
    mixed = latents.prior == "gmm"
    other = latents.components != TRAINED.components
    require((mixed or not other, "--components is of a mixture: add --prior gmm, or leave it out"))
    model = _open(run, device)
    given = {"steps": latents.steps, "guidance": latents.guidance}
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen:
        require((not mixed, f"--{' and --'.join(chosen)} are of a flow: leave out --prior gmm"))
        model = model.with_flow(**chosen)
    if mixed:
        from naign.evaluate.refit import with_mixture

        with busy("fitting a mixture to codes of training images"):
            return with_mixture(model, run, components=latents.components)
    if not model.fitted:
        print(f"warning: {run} stopped before its prior was fitted: train on, or add --prior gmm", file=sys.stderr)
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
