"""A repository for the Hugging Face hub: a model, and its card (README.md) written from its evaluation.

The text of the card is `card.md.jinja`. Its front matter is what the hub indexes: tags, licence, data set.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import UndefinedError

from naign.errors import InputError
from naign.evaluate.recorded import fingerprint, folder_of
from naign.evaluate.report import DAMAGE, learned_classes, templates
from naign.model.files import shipped_model
from naign.model.naign import NAIGN
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
    "neighbours": "Samples over their nearest training image",
}
"""The pictures of an evaluation that a card shows, in this order."""


def write_repository(
    folder: Path,
    model: NAIGN,
    run: str,
    *,
    name: str,
    license: str | None = None,
) -> int:
    """Write model.safetensors, config.json, README.md and pictures: all that is uploaded. Returns the number of files.

    The model is from `run`: a run (or s3://), a checkpoint, an exported folder or its file. `name` is user/model on the
    hub, or that of a folder; `license`, of the weights, as the hub abbreviates it, which the card states.
    Raises InputError, before anything is written, where the folder is not empty, or this state was not evaluated.
    """
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something already: give a new or empty folder")
    again = f"run `naign evaluate {run}` first"
    if shipped_model(run):
        again = f"run `naign export {run} --to FOLDER` first"
    store = open_store(f"{folder_of(run)}/evaluation")
    if not store.exists("metrics.json"):
        raise InputError(f"{run} has no evaluation to write a model card from: {again}")
    shared = NAIGN(model.network, without_places(model.metadata), model.state)
    pictures = {}
    for key, title in PICTURES.items():
        if store.exists(f"{key}.png"):
            pictures[f"{key}.png"] = title
    try:
        metrics = without_places(json.loads(store.read("metrics.json"), parse_constant=lambda constant: None))
        if metrics["weights"] != fingerprint(model):
            raise InputError(f"the evaluation of {run} is of other weights or prior: {again}")
        text = _render_card(shared, metrics, name=name, license=license, pictures=pictures)
    except InputError:
        raise
    except (UndefinedError, LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{store.url('metrics.json')} lacks what a model card says ({error}): {again}") from None
    shared.save_pretrained(folder)  # first, as it refuses weights that float16 does not hold
    for picture in pictures:
        write_atomically(folder / picture, store.read(picture))
    write_atomically(folder / "README.md", text)
    return len(pictures) + 3


def _render_card(
    model: NAIGN,
    metrics: dict[str, Any],
    **values: Any,
) -> str:
    learned = model.metadata.get("dataset") or metrics["dataset"]
    template = templates(autoescape=False).get_template("card.md.jinja")
    return template.render(
        values,
        model=model,
        measured=metrics,
        settings=yaml.safe_dump(model.metadata.get("config", {}), sort_keys=True),
        learned=learned,
        dataset=DATASETS.get(learned),
        damages=DAMAGE,
        classes=learned_classes(model),
    )


def without_places(value: Any, key: str = "") -> Any:
    """JSON without places: of a path its last part is left, of a URL nothing; names of classes stay.

    `key` says where the value stands; texts of notes and warnings lose only folders and addresses.
    """
    if isinstance(value, dict):
        return {name: without_places(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [without_places(part, key) for part in value]
    if not isinstance(value, str) or key in ("labels", "classes"):
        return value
    if key in ("notes", "warnings"):
        return re.sub(PLACE, "", value)
    if "://" in value:
        return ""
    return value.rstrip("/").rpartition("/")[2]
