"""A repository for the Hugging Face hub: a model, and its card (README.md) written from its evaluation.

The text of the card is `card.md.jinja`. Its front matter is what the hub indexes: tags, licence, data set, results.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import UndefinedError

from pipeline.errors import InputError, require
from pipeline.evaluate.recorded import fingerprint
from pipeline.evaluate.report import DAMAGE, templates
from pipeline.evaluate.runs import folder_of
from pipeline.model.hub import without_places
from pipeline.model.naign import NAIGN
from pipeline.storage.base import Store
from pipeline.storage.local import write_atomically
from pipeline.storage.store import open_store

DATASETS = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
}
"""Names on the hub of data sets that `naign pack` knows."""

GENERATION, REPAIR = "unconditional-image-generation", "image-to-image"  # tasks of the hub

PICTURES = {
    "samples": "Samples f(z), the first of those drawn, not chosen",
    **{f"restoration_{kind}": f"Repair of test images: {name.lower()}" for kind, name in DAMAGE.items()},
    "applications": "The same z, f applied one to five times",
    "interpolation": "Between two samples",
    "neighbours": "Samples over their nearest training image",
    "distance": "How far f moves a point",
}
"""The pictures of an evaluation that a card shows, in this order."""


def write_repository(
    folder: Path,  # to write
    model: NAIGN,
    run: str,  # where the model is from: a run (or s3://), a checkpoint, an exported folder or its file
    *,
    name: str,  # of the repository: user/model
    license: str | None = None,  # of the weights, as the hub abbreviates it; None: the card says that none is stated
) -> int:
    """Write model.safetensors, config.json, README.md and pictures: all that is uploaded. Returns the number of files.

    Raises InputError, before anything is written, where the run was not evaluated, or not in this state.
    """
    store, metrics = _read_evaluation(model, run)
    present = set(store.list())
    pictures = {f"{key}.png": title for key, title in PICTURES.items() if f"{key}.png" in present}
    shared = NAIGN(model.network, without_places(model.metadata), model.prior.state_dict())
    try:
        card = _render(shared, _shareable(metrics, model), pictures, name=name, license=license)
    except (UndefinedError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{store.url('metrics.json')} lacks what a model card says ({error}): run `naign evaluate {run}` again"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_atomically(folder / picture, store.read(picture))
    write_atomically(folder / "README.md", str(card))
    shared.save_pretrained(folder)
    return len(pictures) + 3


def _shareable(metrics: dict[str, Any], model: NAIGN) -> dict[str, Any]:
    """The metrics without folders and buckets, of which texts keep the last part, and with None for what is no number.

    Encoders are known by their whole name, which may have spaces.
    """
    header = model.metadata.get("config", {})
    used = [header.get("objective", {}), header.get("match", {}).get("space", {}), metrics, metrics["second"] or {}]
    names = sorted({str(part["encoder"]) for part in used if part.get("encoder")}, key=len, reverse=True)

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(part) for key, part in value.items()}
        if isinstance(value, list):
            return [shown(part) for part in value]
        if isinstance(value, str):
            for name in names:
                value = value.replace(name, name.rstrip("/").rpartition("/")[2])
            return re.sub(r"[^\s,;()'\"`*]*/(?=[^\s/])", "", value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: shown(value) for key, value in metrics.items()}


def _read_evaluation(model: NAIGN, run: str) -> tuple[Store, dict[str, Any]]:
    store = open_store(f"{folder_of(run)}/evaluation")
    again = f"run `naign evaluate {run}` first"
    require((store.exists("metrics.json"), f"{run} has no evaluation to write a model card from: {again}"))
    try:
        metrics = json.loads(store.read("metrics.json"))
        measured = metrics.get("images_seen")
    except (ValueError, AttributeError):
        raise InputError(f"{store.url('metrics.json')} is no evaluation: {again}") from None
    seen = model.metadata.get("images_seen")
    state = f"the evaluation of {run} is of its state after {measured} images, the model has seen {seen}: {again}"
    other = f"the evaluation of {run} is of other weights, or of another prior: {again}"
    require((measured == seen, state), (metrics.get("weights") in (None, fingerprint(model)), other))
    return store, metrics


def _render(
    model: NAIGN, metrics: dict[str, Any], pictures: dict[str, str], *, name: str, license: str | None
) -> ModelCard:
    results = _results(metrics)
    learned = model.metadata.get("dataset") or metrics["dataset"]
    dataset = DATASETS.get(learned)
    data = ModelCardData(
        library_name="naign",
        license=license,
        datasets=[dataset] if dataset else None,
        tags=["naign", "idempotent-generative-network", "pytorch_model_hub_mixin", "model_hub_mixin"],
        pipeline_tag=GENERATION if len(model.shape) == 3 else None,
        metrics=sorted({result.metric_type for result in results}),
        model_name=name,
        eval_results=results or None,
    )
    settings = yaml.safe_dump(model.metadata.get("config", {}), sort_keys=True)
    card = templates(autoescape=False).get_template("card.md.jinja")
    text = card.render(
        front=data.to_yaml(),
        name=name,
        model=model,
        measured=metrics,
        pictures=pictures,
        settings=settings,
        learned=learned,
        damages=DAMAGE,
        license=license,
        dataset=dataset,
    )
    return ModelCard(text)


def _results(metrics: dict[str, Any]) -> list[EvalResult]:
    """The numbers of the card in the form that the hub indexes, to four digits."""
    rows: list[tuple[str, str, str, float | None]] = []  # task, metric, its name on the card, value
    for fd in ({"encoder": metrics["encoder"], **metrics["fd"]}, metrics["second"]):
        for key, label in (("once", "f(z)"), ("twice", "f(f(z))")) if fd else ():
            rows.append((GENERATION, "frechet-distance", f"Fréchet distance on {fd['encoder']}: {label}", fd[key]))
    for key in ("precision", "recall", "density", "coverage"):
        rows.append((GENERATION, key, key.capitalize(), metrics["coverage"][key]))
    for kind, errors in (metrics["restoration"] or {}).items():
        label = f"f(x), damage: {DAMAGE[kind].lower()}"
        rows.append((REPAIR, "mae", f"Mean absolute error in [-1, 1] of {label}", errors["once"]))
        rows.append((REPAIR, "psnr", f"PSNR in dB of {label}", errors["psnr"]["once"]))
        rows.append((REPAIR, "ssim", f"SSIM of {label}", errors["ssim"]["once"]))
    return [
        EvalResult(
            task_type=task,
            dataset_type=DATASETS.get(metrics["dataset"], metrics["dataset"]),
            dataset_name=metrics["dataset"],
            dataset_split="test",
            metric_type=metric,
            metric_name=name,
            metric_value=float(f"{value:.4g}"),
        )
        for task, metric, name, value in rows
        if value is not None
    ]
