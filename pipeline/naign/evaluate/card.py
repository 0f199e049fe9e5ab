"""A repository for the Hugging Face hub: a model, and its card (README.md) written from its evaluation.

The text of the card is `card.md.jinja`. Its front matter is what the hub indexes: tags, licence, data set.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import UndefinedError

from naign.errors import InputError, require
from naign.evaluate.recorded import fingerprint
from naign.evaluate.report import DAMAGE, learned_classes, templates
from naign.evaluate.runs import folder_of
from naign.model.hub import without_places
from naign.model.naign import NAIGN
from naign.model.weights import shipped_model
from naign.storage.local import write_atomically
from naign.storage.store import open_store

DATASETS = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}
"""Names on the hub of data sets that `naign pack` knows."""

PLACE = r"[^\s,;()'\"`*]*/(?=[^\s/])"  # of a path or an address, all but its last part

PICTURES = {
    "samples": "Samples f(z), the first of those drawn, not chosen",
    "classes": "Samples by class",
    **{f"restoration_{kind}": f"Repair of test images: {name}" for kind, name in DAMAGE.items()},
    "applications": "The same z, f applied one to five times",
    "interpolation": "Between two samples",
    "neighbours": "Samples over their nearest training image",
}
"""The pictures of an evaluation that a card shows, in this order."""


def write_repository(folder: Path, model: NAIGN, run: str, *, name: str, license: str | None = None) -> int:
    """Write model.safetensors, config.json, README.md and pictures: all that is uploaded. Returns the number of files.

    The model is from `run`: a run (or s3://), a checkpoint, an exported folder or its file. `name` is user/model on the
    hub, or that of a folder; `license`, of the weights, as the hub abbreviates it, which the card states.
    Raises InputError, before anything is written, where the folder is not empty, or this state was not evaluated.
    """
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    store = open_store(f"{folder_of(run)}/evaluation")
    again = f"run `naign {f'export {run} --to FOLDER' if shipped_model(run) else f'evaluate {run}'}` first"
    require(
        (empty, f"{folder} holds something already: give a new or empty folder"),
        (store.exists("metrics.json"), f"{run} has no evaluation to write a model card from: {again}"),
    )
    shared = NAIGN(model.network, without_places(model.metadata), model.prior.state_dict())
    present = set(store.list())
    pictures = {f"{key}.png": title for key, title in PICTURES.items() if f"{key}.png" in present}
    try:
        metrics = _shareable(store.read("metrics.json").decode(), model)
        measured, seen = metrics["images_seen"], model.metadata.get("images_seen")
        evaluation = f"the evaluation of {run} is of"
        require(
            (measured == seen, f"{evaluation} its state after {measured} images, not {seen}: {again}"),
            (metrics.get("weights") in (None, fingerprint(model)), f"{evaluation} other weights or prior: {again}"),
        )
        learned = shared.metadata.get("dataset") or metrics["dataset"]
        settings = yaml.safe_dump(shared.metadata.get("config", {}), sort_keys=True)
        values = {"name": name, "model": shared, "measured": metrics, "pictures": pictures, "license": license}
        values |= {"settings": settings, "learned": learned, "dataset": DATASETS.get(learned), "damages": DAMAGE}
        classes = learned_classes(shared)
        values |= {"classes": classes, "asked": json.dumps(classes[0], ensure_ascii=False) if classes else ""}
        text = templates(autoescape=False).get_template("card.md.jinja").render(values)
    except InputError:
        raise
    except (UndefinedError, LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{store.url('metrics.json')} lacks what a model card says ({error}): {again}") from None
    shared.save_pretrained(folder)  # first, as it refuses weights that float16 does not hold
    for picture in pictures:
        write_atomically(folder / picture, store.read(picture))
    write_atomically(folder / "README.md", text)
    return len(pictures) + 3


def _shareable(text: str, model: NAIGN) -> dict[str, Any]:
    """The content of metrics.json without folders and buckets, of which texts keep the last part; NaN is None."""
    metrics: dict[str, Any] = json.loads(text)
    header = model.metadata.get("config", {})
    used = [header.get("objective", {}), metrics, metrics.get("second") or {}]
    # An encoder's whole name is replaced, since it may have spaces.
    for name in sorted((str(part["encoder"]) for part in used if part.get("encoder")), key=len, reverse=True):
        quoted = json.dumps(name)[1:-1]
        text = text.replace(quoted, quoted.rstrip("/").rpartition("/")[2])
    shared: dict[str, Any] = json.loads(re.sub(PLACE, "", text), parse_constant=lambda constant: None)
    return shared
