"""evaluate(run folder): measure a trained network, write evaluation/metrics.json, pictures and report.html."""

import json
import math
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from naign.data.format.manifest import Manifest
from naign.errors import InputError, require
from naign.evaluate import measures
from naign.evaluate.coverage import NEIGHBOURS
from naign.evaluate.measures import STAGES, Subject
from naign.evaluate.notes import write_notes, write_warnings
from naign.evaluate.recorded import fingerprint, recorded
from naign.evaluate.report import Picture, draw_pictures, render, with_copies
from naign.evaluate.runs import flat, folder_of, number
from naign.model.encoders import Encoder, choose_encoder, open_encoder
from naign.model.hub import PREFIX
from naign.model.naign import NAIGN
from naign.model.weights import shipped_model
from naign.observe.pictures import png
from naign.storage.base import Store
from naign.storage.store import open_store
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
    progress: bool = True,  # bar on stderr
) -> dict[str, Any]:
    """Measure the model and write `evaluation/{metrics.json, report.html, *.png}` in its folder.

    Returns what metrics.json holds. MNIST, two cores, 10,000 samples: about 90 s.
    Raises InputError where there is no model, no data, no such encoder, or one of them is for another shape.
    """
    beside = f"the results are written beside the model: evaluate a copy, naign export {folder} --to FOLDER"
    few = f"{samples} samples are too few to measure: --samples must be more than {NEIGHBOURS}"
    elsewhere = folder.startswith(PREFIX) or shipped_model(folder)
    require((not elsewhere, beside), (samples > NEIGHBOURS, few))
    start, threads = time.monotonic(), torch.get_num_threads()
    with busy(f"reading {folder}", shown=progress):
        model = NAIGN.from_pretrained(folder, device=device)
    config, manifest, trained_with = recorded(model, folder, data)
    first, (second, missing) = choose_encoder(manifest), _open_second(encoder, manifest, device)
    metrics: dict[str, Any] = {"encoder": first.name, "encoder_accuracy": first.accuracy, "dataset": manifest.name}
    layout = "{desc:<35}{bar}{n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=len(STAGES) + 2, disable=not progress or None, bar_format=layout, desc="reading data") as bar:
        train, test, labels = measures.read(config, manifest.shape, seed=seed)
        subject = Subject(model, manifest, first, train, test, samples, seed, labels, second=second)
        subject.progress = lambda share: bar.set_description(f"{title}, {share:.0%}")
        for title in (*STAGES, "pictures and report"):
            bar.update()
            bar.set_description(title)
            if progress and bar.disable:  # stderr is no terminal
                print(f"{time.monotonic() - start:.0f} s: {title}", file=sys.stderr, flush=True)
            metrics |= STAGES[title](subject) if title in STAGES else {}
        drawn, header = draw_pictures(subject), model.metadata
        beyond = [key for key, value in flat(metrics).items() if isinstance(value, float) and not math.isfinite(value)]
        metrics = json.loads(json.dumps(metrics), parse_constant=lambda name: None)  # JSON has no such numbers
        metrics |= {
            "seed": number(header.get("seed", seed)),
            "evaluation_seed": seed,
            **{key: number(header.get(key)) for key in ("images_seen", "training_seconds", "cpu_seconds")},
            "counts": subject.counts,
            "warnings": list(write_warnings(subject, trained_with, config.split)),
            "weights": fingerprint(model),
            "checkpoint": model.checkpoint or None,
            "notes": [*write_notes(subject, metrics, beyond), *missing],
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"a CPU, {threads} threads",
            "seconds": round(time.monotonic() - start, 1),
        }
        _write(open_store(f"{folder_of(folder)}/evaluation"), metrics, drawn, config=header.get("config", header))
        bar.update()
    return metrics


def _open_second(name: str | None, manifest: Manifest, device: str) -> tuple[Encoder | None, list[str]]:
    """The second encoder, on the device, and a note where natural images have none. InputError for a chosen one."""
    if name is None and (manifest.kind != "image" or manifest.shape[0] != 3):
        return None, []
    try:
        return open_encoder("encoder", name or STRANGER, tuple(manifest.shape), device), []
    except InputError as error:
        if name is not None:
            raise
        return None, [f"Fréchet distances are on one encoder, no second one of ImageNet confirms them: {error}."]


def _write(store: Store, metrics: dict[str, Any], drawn: list[Picture], *, config: dict[str, Any]) -> None:
    """Write pictures, report and, last, metrics.json, each atomically: with metrics.json everything is there."""
    for picture in drawn:
        store.put(f"{picture.name}.png", png(picture.image))
    page = render(metrics, drawn, config=config, title=f"NAIGN on {metrics['dataset']}")
    page = with_copies(page, store, metrics["weights"])
    store.put("report.html", page.encode(errors="backslashreplace"))  # a name may be no UTF-8
    store.put("metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
