"""What the header of a model file records of the data of its training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from naign.data.dataset import DataConfig, parse_resize
from naign.data.decode import decode_image
from naign.data.format.manifest import Manifest
from naign.data.reader import DataSet
from naign.data.resize import Resize, channels, resized
from naign.data.sample import crop
from naign.data.scale import scaled
from naign.errors import InputError
from naign.model.naign import NAIGN
from naign.settings.constraints import check_fields

RECORDED = ("path", "index", "split", "size", "broken")
"""Settings of data that say how the training's images are read, besides data.crop."""


def folder_of(run: str) -> str:
    """The folder of a run, a checkpoint or a model, which may be given by its file; addresses stay as they are."""
    path = Path(run)
    if path.is_file():
        return str(path.parent)
    return run.rstrip("/")


def recorded(
    model: NAIGN,
    folder: str,
    data: str | None,
) -> tuple[DataConfig, Manifest]:
    """The data set to measure on, and its manifest, whose shape is that of the model's images.

    Raises InputError for a header that no training wrote, and a data set that is missing or does not fit.
    """
    config = _header(model)
    remedy = f"{folder} was trained on {config.path}: if that moved, give it as --data PATH"
    if data is not None:
        config = replace(config, path=data, index="")
        remedy = "give the data set it was trained on as --data PATH"
    elif not config.path:
        raise InputError(f"{folder} does not say what it was trained on: give the packed data set as --data PATH")
    try:
        dataset = DataSet(config)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from error
    shape = dataset.shape
    if shape != model.shape:
        other = f"{config.path} ({dataset.manifest.name}) holds examples of shape {shape}"
        raise InputError(f"{other}, the model in {folder} is for {model.shape}; {remedy}")
    return config, replace(dataset.manifest, shape=shape)


def read_image(data: bytes, model: NAIGN) -> Tensor:
    """An image file as (1, C, H, W) float32 in [-1, 1], brought to the model's size as evaluation does it.

    Raises InputError for bytes that are not a picture, and one that is smaller than the model's windows (data.crop).
    """
    config = _header(model)
    resize = parse_resize(config)
    count, height, width = model.shape
    if resize.crop:
        pixels = crop(decode_image(data), resize.crop)
    else:
        pixels = resized(data, Resize(height=height, width=width))
    copy = np.array(channels(pixels, count))  # what Pillow gives is not writable
    return scaled(torch.from_numpy(copy)[None])


def sees_wholes(model: NAIGN) -> bool:
    """Whether f suits whole pictures, not tiles of them: it has a dense code, and was not trained on windows."""
    config = _header(model)
    return len(getattr(model.network, "code", ())) == 1 and not config.crop


def _header(model: NAIGN) -> DataConfig:
    """The training's images and how they are read. InputError as `recorded`."""
    try:
        section = model.metadata.get("config", {}).get("data", {})
        config = DataConfig(path="", crop=int(section.get("crop", 0)))
        for name in RECORDED:
            if section.get(name):
                setattr(config, name, str(section[name]))
        check_fields(replace(config, path="any"), "data")
        parse_resize(config)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the model has a header that no training wrote: {error}") from None
    return config
