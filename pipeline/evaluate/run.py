"""evaluate(run folder): measure a trained network, write evaluation/metrics.json, pictures and report.html.

Reads top to bottom: load, measure stage by stage, draw, write.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.checkpoint.bucket import fetch_newest
from pipeline.data.dataset import DataConfig, image_shape
from pipeline.data.format.manifest import Manifest
from pipeline.errors import InputError
from pipeline.evaluate import NEIGHBOURS, measures
from pipeline.evaluate.measures import Subject, within
from pipeline.evaluate.report import DAMAGE, Picture, render
from pipeline.model.encoders import choose_encoder, load_encoder
from pipeline.model.naign import NAIGN
from pipeline.observe import pictures
from pipeline.storage.local import write_atomically
from pipeline.storage.store import open_store, use_endpoint

REPAIRED = 2_500
"""Test images for each damage; f is applied to each twice."""
OUTLIERS = 1_000
"""Test images from which outliers are made; f is applied about four times as often."""
STAGES = 7
STEPS = 12
"""Images of an interpolation."""
FEW = 1000
"""With fewer examples a Frechet distance on 64 features is mostly bias."""


def evaluate(
    folder: str,  # a run, also s3://, checkpoint or exported model; results go to its evaluation/
    *,
    data: str | None = None,  # packed data set; None: the one the run was trained on
    samples: int = 10_000,  # how many f(z) to draw; Frechet distances of different counts do not compare
    seed: int = 0,  # of latents, damage and order
    device: str = "cpu",  # where f is computed
    progress: bool = True,  # bar on stderr
) -> dict[str, Any]:
    """Measure the model and write `evaluation/{metrics.json, report.html, *.png}` in its folder.

    Returns what metrics.json holds. MNIST, two cores, 10,000 samples: about 90 s.
    Raises InputError where there is no model, no data, or the data are of another shape than the model's.
    """
    if folder.startswith("s3:"):
        with tempfile.TemporaryDirectory() as copy:
            fetch_newest(folder, Path(copy))
            found = evaluate(copy, data=data, samples=samples, seed=seed, device=device, progress=progress)
            store = open_store(f"{folder.rstrip('/')}/evaluation")
            made = (Path(copy) / "evaluation").iterdir()
            for file in sorted(made, key=lambda file: file.name == "metrics.json"):  # last: then all is there
                store.put(file.name, file.read_bytes())
        return found
    started = time.monotonic()
    if samples <= NEIGHBOURS:
        raise InputError(f"{samples} samples are too few to measure: --samples must be more than {NEIGHBOURS}")
    model = NAIGN.from_pretrained(folder, device=device)
    path, manifest, crop, used = _recorded(model, folder, data)
    place = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    encoder = choose_encoder(manifest)
    notes = []
    learned = model.metadata.get("dataset")
    if learned and learned != manifest.name:
        notes.append(
            f"The network learned {learned} and is measured on {manifest.name}, with the encoder for those: no number "
            "here says how well it does what it was trained for."
        )
    known = {name: _name_of(name) for name in used}
    gone = [name for name, own in known.items() if own is None]
    if gone and encoder.network is not None:
        notes.append(
            f"The network was trained with the encoder {', '.join(gone)}, which is not there any more: if that was the "
            f"one it is measured on, {encoder.name}, its distances do not compare with those of other networks."
        )
    if encoder.name in known.values():
        notes.append(
            f"The network was trained with the encoder {encoder.name}, which it is measured on: its Fréchet distances "
            "and coverage do not compare with those of networks that were not."
        )
    layout = "{desc:<30}{bar}{n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=STAGES, disable=not progress, bar_format=layout) as bar:
        metrics: dict[str, Any] = {
            "encoder": encoder.name,
            "encoder_accuracy": encoder.accuracy,
            "dataset": manifest.name,
            "modes": None,
            "restoration": None,
            "density": None,
            "idempotence": {"damaged": None},
        }
        with _stage(bar, "reading data"):
            subject = measures.read(model, path, encoder, manifest, seed=seed, crop=crop)
        for split in ("train", "test"):
            if (there := subject.counts[split]) <= NEIGHBOURS:
                raise InputError(
                    f"{path} has {there} examples in its {split} split, too few to measure with: give a data set with "
                    f"more than {NEIGHBOURS} in each split, with --data"
                )
        with _stage(bar, "drawing samples, applying f"):
            measures.draw(subject, count := within(samples, manifest.shape))
        if count < samples:
            notes.append(f"Samples were limited to {count:,} of {samples:,}: examples of this size fill the memory.")
        if encoder.network is None and subject.is_image:
            notes.append(
                f"No encoder ships for {manifest.name} {manifest.shape} of {len(manifest.labels)} classes: distances "
                "are on pixels pooled to at most 8×8, which see layout and colour, not detail, and no class is counted."
            )
        with _stage(bar, "distance and coverage"):
            _merge(metrics, measures.overlap(subject))
        if metrics["fd"]["once_ratio"] is None:
            notes.append("Training and test split are alike, so that no distance is a multiple of theirs.")
        least = min(subject.counts[name] for name in ("samples", "test", "floor"))
        if least < FEW:
            notes.append(
                f"Fréchet distances, the floor's too, rest on as few as {least:,} examples, and much of their value is "
                "bias: compare them with others of the same counts only."
            )
        with _stage(bar, "nearest training examples"):
            part, neighbours = measures.copying(subject)
            _merge(metrics, part)
        with _stage(bar, "reconstruction and energy"):
            part, energies = measures.fixed_points(subject, REPAIRED)
            _merge(metrics, part)
            if subject.is_image:
                _merge(metrics, measures.separation(subject, energies, OUTLIERS))
        repaired: dict[str, dict[str, Tensor]] = {}
        with _stage(bar, "repair"):
            if subject.is_image:
                part, repaired = measures.repairs(subject, REPAIRED)
                _merge(metrics, part)
            else:
                notes.append("Points: repair, classes and energy against image outliers do not apply.")
        with _stage(bar, "pictures and report"):
            drawn = _image_pictures(subject, neighbours, repaired) if subject.is_image else _point_pictures(subject)
            trained = model.metadata
            metrics |= {
                "seed": _number(trained.get("seed", seed)),
                "evaluation_seed": seed,
                "images_seen": _number(trained.get("images_seen")),
                "training_seconds": _number(trained.get("training_seconds")),
                "cpu_seconds": _number(trained.get("cpu_seconds")),
                "counts": subject.counts,
                "notes": notes,
                "device": _device_name(device),
                "seconds": round(time.monotonic() - started, 1),
            }
            _write(place / "evaluation", metrics, drawn, config=trained.get("config", trained))
    return metrics


def _name_of(encoder: str) -> str | None:
    """That an encoder's file gives itself, so that a copy is known as what it is; None where it is gone."""
    try:
        return load_encoder(encoder).metadata.get("name", encoder)
    except InputError:
        return None


def _recorded(model: NAIGN, folder: str, data: str | None) -> tuple[str, Manifest, int, list[str]]:
    """As `_data_of`, and the encoders it was trained with; InputError for a model's header that no run wrote."""
    try:
        config = model.metadata.get("config", {})
        space = config.get("match", {}).get("space", {})
        used = [str(part["encoder"]) for part in (config.get("objective", {}), space) if part.get("encoder")]
        return (*_data_of(model, folder, data), used)
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the model in {folder} has a header that no training wrote: {error}") from None


def _number(value: Any) -> float | None:
    """What a header says, if it is a number."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return value if known else None


def _data_of(model: NAIGN, folder: str, data: str | None) -> tuple[str, Manifest, int]:
    """The data set to measure on, its manifest as the model saw it, and the side of the windows that it was trained on
    (0: whole images); or an InputError that says how to name one.
    """
    recorded = model.metadata.get("config", {}).get("data", {})
    path, crop = data or recorded.get("path"), int(recorded.get("crop", 0))
    use_endpoint(str(recorded.get("endpoint", "")))
    if not path:
        raise InputError(f"{folder} does not say what it was trained on: give the packed data set as --data PATH")
    try:
        manifest = Manifest.load(str(path))
        manifest = replace(manifest, shape=image_shape(DataConfig(crop=crop), manifest))
    except InputError as error:
        if data is not None:
            raise
        raise InputError(f"{error}; {folder} was trained on {path}: if that moved, give it as --data PATH") from error
    if tuple(manifest.shape) != tuple(model.shape):
        raise InputError(
            f"{path} ({manifest.name}) holds examples of shape {tuple(manifest.shape)}, the model in {folder} is for "
            f"{tuple(model.shape)}: give the data set it was trained on as --data PATH"
        )
    return str(path), manifest, crop


@contextmanager
def _stage(bar: "tqdm[Any]", title: str) -> Iterator[None]:
    bar.set_description(title)
    yield
    bar.update()


def _merge(metrics: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part; 'idempotence' comes from two of them."""
    for key, value in part.items():
        metrics[key] = metrics[key] | value if isinstance(metrics.get(key), dict) else value


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"


def _image_pictures(subject: Subject, neighbours: Tensor, repaired: dict[str, dict[str, Tensor]]) -> list[Picture]:
    noise = subject.model.latent(torch.arange(10), seed=subject.seed).cpu()
    times = [("noise z", noise), ("f once", subject.once[:10]), ("f twice", subject.twice[:10])]
    for count in (3, 4, 5):
        times.append((f"{count} times", subject.model.project(times[-1][1])))
    drawn = [
        Picture(
            name="samples",
            title="Samples",
            caption="f(z): the network applied once to noise. The first of those drawn, not chosen.",
            image=pictures.grid(subject.once[:96], columns=16),
        ),
        Picture(
            name="applications",
            title="The same noise, f applied one to five times",
            caption="A column is one noise. For a perfect projection all rows below the noise are alike.",
            image=pictures.rows(times),
        ),
    ]
    drawn.append(
        Picture(
            name="interpolation",
            title="Between two samples",
            caption="f(z) on the way from one noise, left, to another, right, along the arc between them.",
            image=pictures.grid(_between(subject), columns=STEPS),
        )
    )
    for kind, answers in repaired.items():
        clean = subject.test[: len(answers["input"])]
        lines = [("clean", clean), ("damaged", answers["input"]), ("f once", answers["once"])]
        lines += [("f twice", answers["twice"]), ("nearest", answers["nearest"])]
        drawn.append(
            Picture(
                name=f"restoration_{kind}",
                title=f"Repair: {DAMAGE[kind].lower()}",
                caption="Test images. f is not told what was done to them. Last row: the "
                "nearest training image, an answer that needs no network.",
                image=pictures.rows(lines),
            )
        )
    drawn.append(
        Picture(
            name="neighbours",
            title="Samples over their nearest training image",
            caption="Alike in kind is good; the same image would be a copy.",
            image=pictures.rows([("f(z)", subject.once[: len(neighbours)]), ("training", neighbours)]),
        )
    )
    return drawn


def _between(subject: Subject) -> Tensor:
    """Six rows of STEPS images (n, *shape), from one sample to another; cos and sin keep the latents' variance."""
    latents = subject.model.latent(torch.arange(12), seed=subject.seed)
    angle = torch.linspace(0, math.pi / 2, STEPS, device=latents.device).view(1, -1, *(1,) * len(subject.model.shape))
    way = angle.cos() * latents[:6, None] + angle.sin() * latents[6:, None]
    return subject.model.project(way.flatten(0, 1)).cpu()


def _point_pictures(subject: Subject) -> list[Picture]:
    if subject.test.shape[1] != 2:
        return []
    real = subject.test[:2000]
    panels = [("test data", real), ("f(z)", subject.once[:2000]), ("f(f(z))", subject.twice[:2000])]
    return [
        Picture(
            name="samples",
            title="Samples",
            caption="Orange over the test data in blue.",
            image=pictures.scatter(panels, behind=real),
        ),
        Picture(
            name="distance",
            title="How far f moves a point",
            caption="|f(x) − x| over the plane, white where f leaves a point alone, which should be the data alone.",
            image=pictures.heat(lambda x: subject.model.energy(x).sqrt(), behind=real),
        ),
    ]


def _write(folder: Path, metrics: dict[str, Any], drawn: list[Picture], *, config: dict[str, Any]) -> None:
    """Pictures and report first, metrics.json last, each in one rename: metrics.json there means all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{picture.name}.png": picture.png() for picture in drawn}
    title = f"NAIGN on {metrics['dataset']}"
    files["report.html"] = render(metrics, drawn, config=config, title=title).encode()
    files["metrics.json"] = (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
