"""evaluate(run folder): measure a trained network, write evaluation/metrics.json, pictures and report.html."""

import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.data.format.manifest import Manifest
from pipeline.errors import InputError
from pipeline.evaluate import measures
from pipeline.evaluate.coverage import NEIGHBOURS
from pipeline.evaluate.measures import STAGES, Subject
from pipeline.evaluate.pictures import draw_pictures
from pipeline.evaluate.recorded import fingerprint, recorded
from pipeline.evaluate.report import Picture, render
from pipeline.model.encoders import Encoder, choose_encoder, load_encoder
from pipeline.model.hub import is_hub_name
from pipeline.model.naign import NAIGN
from pipeline.observe.pictures import png
from pipeline.storage.local import write_atomically
from pipeline.storage.store import open_store
from pipeline.terminal import busy

FEW = 1000  # with fewer examples a Frechet distance on 64 features is mostly bias
STRANGER = "efficientnet-lite2"  # natural images are measured on it, too: trained on ImageNet, by others


def evaluate(
    folder: str,  # a run, also s3://, checkpoint or exported model; results go to its evaluation/
    *,
    data: str | None = None,  # packed data set; None: the one the run was trained on
    samples: int = 10_000,  # how many f(z) to draw; Frechet distances of different counts do not compare
    seed: int = 0,  # of latents, damage and order
    device: str = "cpu",  # where f is computed
    encoder: str | None = None,  # a second one for Frechet distances; None: STRANGER for images of 3 channels
    progress: bool = True,  # bar on stderr
) -> dict[str, Any]:
    """Measure the model and write `evaluation/{metrics.json, report.html, *.png}` in its folder.

    Returns what metrics.json holds. MNIST, two cores, 10,000 samples: about 90 s.
    Raises InputError where there is no model, no data, no such encoder, or one of them is for another shape.
    """
    if is_hub_name(folder):
        copy = f"of a model on the hub, evaluate a copy: naign export {folder} --to FOLDER"
        raise InputError(f"the results are written beside the model, which {folder} does not allow; {copy}")
    start = time.monotonic()
    if samples <= NEIGHBOURS:
        raise InputError(f"{samples} samples are too few to measure: --samples must be more than {NEIGHBOURS}")
    with busy(f"reading {folder}", shown=progress):
        model = NAIGN.from_pretrained(folder, device=device)
    config, manifest, trained_with = recorded(model, folder, data)
    first, (second, missing) = choose_encoder(manifest), _open_second(encoder, manifest, device)
    metrics: dict[str, Any] = {"encoder": first.name, "encoder_accuracy": first.accuracy, "dataset": manifest.name}
    layout = "{desc:<35}{bar}{n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=len(STAGES) + 2, disable=not progress, bar_format=layout, desc="reading data") as bar:
        train, test = measures.read(config, manifest.shape, seed=seed)
        subject = Subject(model, manifest, first, train, test, samples=samples, seed=seed, second=second)
        for title, measure in STAGES.items():
            bar.update()
            bar.set_description(title)
            subject.tell = partial(_tell, bar, title)
            metrics |= measure(subject)
        bar.update()
        bar.set_description("pictures and report")
        drawn, header = draw_pictures(subject), model.metadata
        beyond = list[str]()
        metrics = {key: finite(value, key, beyond) for key, value in metrics.items()}
        metrics |= {
            "seed": _number(header.get("seed", seed)),
            "evaluation_seed": seed,
            **{key: _number(header.get(key)) for key in ("images_seen", "training_seconds", "cpu_seconds")},
            "counts": subject.counts,
            "warnings": _warnings(subject, trained_with, config.split),
            "weights": fingerprint(model),
            "checkpoint": {"name": model.checkpoint, "choice": model.choice} if model.checkpoint else None,
            "notes": [*_notes(subject, metrics), *missing, *_beyond(beyond)],
            "device": _device_name(device),
            "seconds": round(time.monotonic() - start, 1),
        }
        config_of_run = header.get("config", header)
        if folder.startswith("s3:"):
            _upload(f"{folder.rstrip('/')}/evaluation", metrics, drawn, config=config_of_run)
        else:
            place = Path(folder) if Path(folder).is_dir() else Path(folder).parent
            _write(place / "evaluation", metrics, drawn, config=config_of_run)
        bar.update()
    return metrics


def _tell(bar: "tqdm[Any]", title: str, share: float) -> None:
    bar.set_description(f"{title}, {share:.0%}")


def _upload(remote: str, metrics: dict[str, Any], drawn: list[Picture], *, config: dict[str, Any]) -> None:
    """As `_write`, into a folder of a bucket."""
    with tempfile.TemporaryDirectory() as copy:
        _write(Path(copy), metrics, drawn, config=config)
        files = sorted(Path(copy).iterdir(), key=lambda file: file.name == "metrics.json")  # last: then all is there
        for file in files:
            open_store(remote).put(file.name, file.read_bytes())


def _open_second(name: str | None, manifest: Manifest, device: str) -> tuple[Encoder | None, list[str]]:
    """The second encoder, on the device, and a note where natural images have none. InputError for a chosen one."""
    if name is None and (manifest.kind != "image" or manifest.shape[0] != 3):
        return None, []
    try:
        encoder = load_encoder(name or STRANGER)
        if unfit := encoder.unfit(tuple(manifest.shape)):
            raise InputError(f"encoder '{encoder.name}' {unfit}")
    except InputError as error:
        if name is not None:
            raise
        return None, [f"Fréchet distances are on one encoder, no second one of ImageNet confirms them: {error}."]
    if encoder.network is not None:
        encoder.network.to(device)
    return encoder, []


def _warnings(subject: Subject, trained_with: list[str], split: str) -> list[str]:
    """Where the network may have been trained on what measures it; `trained_with` are encoders of the training."""
    found, names = [], {name: _identity(name) for name in trained_with}
    if split == "test":
        found.append("The network was trained on the test split, which it is measured on: no number is of new data.")
    missing = [name for name, own in names.items() if own is None]
    measuring = [one for one in (subject.encoder, subject.second) if one is not None]
    if missing and any(one.network for one in measuring):
        found.append(
            f"The network was trained with the encoder {', '.join(missing)}, which is not there any more: if that is "
            f"one it is measured on, {' or '.join(one.name for one in measuring)}, its distances do not compare with "
            "those of other networks."
        )
    for encoder in measuring:
        if encoder.identity in names.values():
            found.append(
                f"The network was trained with the encoder {encoder.name}, which it is measured on: its Fréchet "
                "distances and coverage on it do not compare with those of networks that were not."
            )
    return found


def _notes(subject: Subject, metrics: dict[str, Any]) -> list[str]:
    """What a reader must know to compare the numbers with others."""
    notes, encoder, manifest, counts = [], subject.encoder, subject.manifest, subject.counts
    learned = subject.model.metadata.get("dataset")
    if learned and learned != manifest.name:
        notes.append(
            f"The network learned {learned} and is measured on {manifest.name}, with the encoder for those: no number "
            "here says how well it does what it was trained for."
        )
    if (count := counts["samples"]) < subject.samples:
        notes.append(
            f"Samples were limited to {count:,} of {subject.samples:,}: examples of this size fill the memory."
        )
    if encoder.network is None and subject.is_image:
        notes.append(
            f"No encoder ships for {manifest.name} {manifest.shape} of {len(manifest.labels)} classes: distances "
            "are on pixels pooled to at most 8×8, which see layout and colour, not detail, and no class is counted."
        )
    if metrics["fd"]["once_ratio"] is None:
        notes.append("Training and test split are alike, so that no distance is a multiple of theirs.")
    if counts["floor"] < count:
        notes.append(
            f"There are {counts['floor']:,} training examples: distances beside the floor, and its multiples, are of "
            "as many samples, and the coverage of training data is that of as many."
        )
    least = min(counts[name] for name in ("samples", "test", "floor"))
    if least < FEW:
        notes.append(
            f"Fréchet distances, the floor's too, rest on as few as {least:,} examples, and much of their value is "
            "bias: compare them with others of the same counts only."
        )
    if (second := metrics["second"]) and FEW <= least < 4 * second["features"]:
        notes.append(
            f"{second['encoder']} has {second['features']:,} features: distances on it, the floor's too, rest on as "
            f"few as {least:,} examples, and much of their value is bias."
        )
    if not subject.is_image:
        notes.append("Points: repair, classes and energy against image outliers do not apply.")
    elif not subject.repairs:
        notes.append("This f carries latents to images and repairs none: repair and energy do not apply.")
    return notes


def _identity(encoder: str) -> str | None:
    """The name by which a copy of an encoder is recognised; None if it cannot be opened any more."""
    try:
        return load_encoder(encoder).identity
    except InputError:
        return None


def finite(value: Any, path: str, beyond: list[str]) -> Any:
    """`value` with None for numbers that are not finite, which JSON lacks; their paths are added to `beyond`."""
    if isinstance(value, dict):
        return {key: finite(part, f"{path}.{key}", beyond) for key, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        beyond.append(path)
        return None
    return value


def _beyond(paths: list[str]) -> list[str]:
    return [f"Beyond what numbers can hold, and left out: {', '.join(paths)}. f has diverged."] if paths else []


def _number(value: Any) -> float | None:
    """A value of the header if it is a finite number, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _device_name(device: str) -> str:
    threads = torch.get_num_threads()
    cuda = device.startswith("cuda")
    return torch.cuda.get_device_name(device) if cuda else f"{threads} CPU thread{'s' if threads > 1 else ''}"


def _write(folder: Path, metrics: dict[str, Any], drawn: list[Picture], *, config: dict[str, Any]) -> None:
    """Write pictures, report and, last, metrics.json, each atomically: with metrics.json everything is there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{picture.name}.png": png(picture.image) for picture in drawn}
    page = render(metrics, drawn, config=config, title=f"NAIGN on {metrics['dataset']}")
    files["report.html"] = page.encode(errors="backslashreplace")  # a name may be no UTF-8
    files["metrics.json"] = (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
