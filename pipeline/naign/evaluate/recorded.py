"""What the header of a model file records of its training: the data, and the encoders."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from naign.checkpoint.manifest import MANIFEST
from naign.data.dataset import DataConfig, parse_resize
from naign.data.decode import decode_image
from naign.data.format.manifest import Manifest
from naign.data.mixing import DataSets
from naign.data.resize import Resize, channels, resized
from naign.data.sample import crop
from naign.errors import InputError, printable, require
from naign.evaluate.runs import folder_of, is_run
from naign.model.naign import NAIGN
from naign.model.scale import scaled
from naign.settings.constraints import check_fields
from naign.storage.store import is_in_bucket, use_endpoint


def recorded(model: NAIGN, folder: str, data: str | None) -> tuple[DataConfig, Manifest, str]:
    """The data set to measure on, its manifest, whose shape is that of the model's images, and the training's encoder.

    A run's S3 server is that of its training; a model from elsewhere cannot choose one, to which requests signed for
    the user would go. InputError for a header that no training wrote, and a data set that is missing or does not fit.
    """
    config, endpoint, encoder = _header(model)
    place = Path(folder_of(folder))
    of_user = is_in_bucket(folder) or is_run(place) or (place / MANIFEST).exists()  # not exported, nor of the hub
    if of_user:
        use_endpoint(endpoint)
    if data is not None:
        config = replace(config, path=data, index="")
    elif "s3:" in config.path + config.index and not of_user:
        known = ("", os.environ.get("AWS_ENDPOINT_URL_S3"), os.environ.get("AWS_ENDPOINT_URL"))
        asked = f"the model in {folder} names the server {printable(endpoint)} for its data"
        remedy = "set AWS_ENDPOINT_URL to it if you trust it, or give the data as --data PATH"
        require((endpoint in known, f"{asked}: {remedy}"))
    require((config.path, f"{folder} does not say what it was trained on: give the packed data set as --data PATH"))
    try:
        sets = DataSets(config)
        manifest = replace(sets.manifest, shape=sets.shape)
    except InputError as error:
        if data is not None:
            raise
        remedy = f"{folder} was trained on {config.path}: if that moved, give it as --data PATH"
        raise InputError(f"{error}; {remedy}") from error
    shape, wanted = tuple(manifest.shape), tuple(model.shape)
    other = f"{config.path} ({manifest.name}) holds examples of shape {shape}, the model in {folder} is for {wanted}"
    require((shape == wanted, f"{other}: give the data set it was trained on as --data PATH"))
    return config, manifest, encoder


def fingerprint(model: NAIGN) -> str:
    """SHA-256 of the weights and of the prior: by it an evaluation is known to be of this model."""
    digest = hashlib.sha256(json.dumps(model.metadata["prior"], sort_keys=True).encode())
    state = {f"prior.{name}": value for name, value in model.prior.state_dict().items()}
    for name, value in sorted((model.network.state_dict() | state).items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_image(data: bytes, model: NAIGN) -> Tensor:
    """An image file as (1, C, H, W) float32 in [-1, 1], brought to the model's size as evaluation does it; InputError
    for bytes that are no picture, or for one that is smaller than the model's windows (data.crop).
    """
    resize, shape = parse_resize(_header(model)[0]), model.shape
    fitted = resize if resize.height else Resize(height=shape[1], width=shape[2])
    pixels = crop(decode_image(data), resize.crop) if resize.crop else resized(data, fitted)
    copy = np.array(channels(pixels, shape[0]))  # what Pillow gives is not writable
    return scaled(torch.from_numpy(copy)[None])


def sees_wholes(model: NAIGN) -> bool:
    """Whether f suits whole pictures, not tiles of them: it has a dense code, and was not trained on windows."""
    return len(getattr(model.network, "code", ())) == 1 and not _header(model)[0].crop


def _header(model: NAIGN) -> tuple[DataConfig, str, str]:
    """The training's images and how they are read, their S3 server, and its encoder or "". InputError as `recorded`."""
    texts = ("path", "index", "split", "size", "fit", "broken")
    try:
        header = model.metadata.get("config", {})
        section, encoder = header.get("data", {}), header.get("objective", {}).get("encoder") or ""
        values: dict[str, Any] = {"path": ""} | {name: str(section[name]) for name in texts if section.get(name)}
        config = DataConfig(crop=int(section.get("crop", 0)), **values)
        check_fields(replace(config, path="any"), "data")
        parse_resize(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the model has a header that no training wrote: {error}") from None
    return config, str(section.get("endpoint", "")), str(encoder)
