"""evaluate(run folder): measure a trained network, write evaluation/metrics.json, pictures and report.html."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from naign.data.dataset import DataConfig
from naign.data.format.manifest import Manifest
from naign.data.images import Images
from naign.errors import InputError
from naign.evaluate import measures
from naign.evaluate.coverage import NEIGHBOURS
from naign.evaluate.inception import check_count, note_on, open_inception
from naign.evaluate.measures import STAGES, Subject
from naign.evaluate.notes import write_notes
from naign.evaluate.recorded import folder_of, recorded
from naign.evaluate.report import Picture, draw_pictures, render
from naign.model.encoders import Encoder, choose_encoder, open_encoder
from naign.model.files import PREFIX, shipped_model
from naign.model.naign import NAIGN
from naign.observe.pictures import png
from naign.storage.base import Store
from naign.storage.store import check_writable, open_store
from naign.terminal import busy

STRANGER = "efficientnet-lite2"  # the second encoder of natural images, trained on ImageNet by others


def evaluate(
    folder: str,  # a run, also s3://, checkpoint or exported model; results go to its evaluation/
    *,
    data: str | None = None,  # packed data set; None: the one the run was trained on
    samples: int = 10_000,  # how many f(z) to draw; Frechet distances of different counts do not compare
    seed: int = 0,  # of latents, damage and order
    device: str = "cpu",  # where f is computed
    encoder: str | None = None,  # a second one for Frechet distances; None: STRANGER for images of 3 channels
    fid: str | None = None,  # Inception's weights, as open_inception takes them; None: no FID
    fid_samples: int = 50_000,  # f(z) that FID is computed of
) -> dict[str, Any]:
    """Measure the model and write `evaluation/{metrics.json, report.html, *.png}` in its folder.

    Returns what metrics.json holds. MNIST, two cores, 10,000 samples: about 90 s.
    Raises InputError where there is no model, no data, no such encoder, or one of them is for another shape.
    """
    if folder.startswith(PREFIX) or shipped_model(folder):
        beside = "the results are written beside the model"
        raise InputError(f"{beside}: evaluate a copy, naign export {folder} --to FOLDER")
    if samples <= NEIGHBOURS:
        raise InputError(f"{samples} samples are too few to measure: --samples must be more than {NEIGHBOURS}")
    if fid is not None:
        check_count("samples", fid_samples)
        network = open_inception(fid, device)
    start = time.monotonic()
    with _said("reading the model", start):
        model = NAIGN.from_pretrained(folder, device=device)
    config, manifest = recorded(model, folder, data)
    first = choose_encoder(manifest)
    second, missing = _open_second(encoder, manifest, device)
    with _said("reading data", start):
        train, test = measures.read(config, manifest.shape, seed=seed)
    judge = None
    if fid is not None:
        images = Images(config, config.split)
        check_count("training images", len(images))
        judge = (network, images)
        missing += note_on(fid)
    subject = Subject(
        model=model,
        manifest=manifest,
        encoder=first,
        second=second,
        inception=judge,
        fid_samples=fid_samples,
        train=train,
        test=test,
        samples=samples,
        seed=seed,
    )
    place = open_store(f"{folder_of(folder)}/evaluation")
    check_writable(place, place.url(""))
    metrics: dict[str, Any] = {
        "encoder": first.name,
        "encoder_accuracy": first.accuracy,
        "dataset": manifest.name,
    }
    for title, measure in STAGES.items():
        with _said(title, start):
            metrics |= measure(subject)
    lost: list[str] = []
    metrics = json.loads(json.dumps(metrics), parse_constant=lost.append)  # None for NaN and infinities
    header = model.metadata
    for key in ("images_seen", "training_seconds", "cpu_seconds"):
        metrics[key] = number(header.get(key))
    metrics |= {
        "seed": number(header.get("seed", seed)),
        "evaluation_seed": seed,
        "counts": subject.counts,
        "warnings": _warnings(model, config),
        "notes": write_notes(subject, metrics, len(lost)) + missing,
        "checkpoint": model.checkpoint or None,
        "device": _in_words(device),
    }
    with _said("pictures and report", start):
        drawn = draw_pictures(subject)
        metrics["seconds"] = round(time.monotonic() - start, 1)
        _write(place, metrics, drawn, header.get("config", header))
    return metrics


def _warnings(model: NAIGN, config: DataConfig) -> list[str]:
    """What makes numbers worthless."""
    warnings = []
    if config.split == "test":
        warnings.append("The network was trained on the test split, which it is measured on: no number is of new data.")
    if not model.fitted:
        warnings.append("The run stopped before its prior was fitted: its samples say nothing.")
    return warnings


def _in_words(device: str) -> str:
    """The name of a card, or the threads of a processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"a CPU, threads: {torch.get_num_threads()}"


def number(value: Any) -> float | None:
    """A value of a header if it is a finite number, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return value
    return None


@contextmanager
def _said(title: str, start: float) -> Iterator[None]:
    """Say on stderr what is being done, each second on a terminal, and else once with the seconds since `start`."""
    if not sys.stderr.isatty():
        print(f"{time.monotonic() - start:.0f} s: {title}", file=sys.stderr, flush=True)
    with busy(title):
        yield


def _open_second(
    name: str | None,
    manifest: Manifest,
    device: str,
) -> tuple[Encoder | None, list[str]]:
    """The second encoder, on the device, and a note where natural images have none. InputError for a chosen one."""
    shape = manifest.shape
    if name:
        return open_encoder("encoder", name, shape, device), []
    if manifest.kind != "image" or shape[0] != 3:
        return None, []
    try:
        return open_encoder("encoder", STRANGER, shape, device), []
    except InputError as error:
        return None, [f"Fréchet distances are on one encoder, no second one of ImageNet confirms them: {error}."]


def _write(
    store: Store,
    metrics: dict[str, Any],
    drawn: list[Picture],
    config: dict[str, Any],
) -> None:
    """Write pictures, report and, last, metrics.json, each atomically: with metrics.json everything is there."""
    for picture in drawn:
        store.put(f"{picture.name}.png", png(picture.image))
    page = render(metrics, drawn, config=config, title=f"NAIGN on {metrics['dataset']}")
    store.put("report.html", page.encode(errors="backslashreplace"))  # a name may not be UTF-8
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    store.put("metrics.json", text.encode())
