"""What a model file says of its training: the data, and the encoders."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.constraints import check_fields
from pipeline.data.dataset import DataConfig, parse_resize
from pipeline.data.format.manifest import Manifest
from pipeline.data.resize import Resize
from pipeline.errors import InputError
from pipeline.model.naign import NAIGN
from pipeline.storage.store import use_endpoint


def recorded(model: NAIGN, folder: str, data: str | None) -> tuple[str, Manifest, Resize, list[str]]:
    """From the model's header: path and manifest of the data set to measure on, how its pictures are resized, and the
    encoders of the training.

    Raises InputError for a header that no training wrote, and if the data set is not there or does not fit the model.
    """
    try:
        config = model.metadata.get("config", {})
        recorded, space = config.get("data", {}), config.get("match", {}).get("space", {})
        used = [str(part["encoder"]) for part in (config.get("objective", {}), space) if part.get("encoder")]
        path, resize = str(data or recorded.get("path") or ""), _resize(recorded)
        use_endpoint(str(recorded.get("endpoint", "")))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the model in {folder} has a header that no training wrote: {error}") from None
    if not path:
        raise InputError(f"{folder} does not say what it was trained on: give the packed data set as --data PATH")
    try:
        manifest = Manifest.load(path)
        manifest = replace(manifest, shape=resize.shape(manifest.shape, manifest.name))
    except InputError as error:
        if data is not None:
            raise
        raise InputError(f"{error}; {folder} was trained on {path}: if that moved, give it as --data PATH") from error
    if tuple(manifest.shape) != tuple(model.shape):
        raise InputError(
            f"{path} ({manifest.name}) holds examples of shape {tuple(manifest.shape)}, the model in {folder} is for "
            f"{tuple(model.shape)}: give the data set it was trained on as --data PATH"
        )
    return path, manifest, resize, used


def recorded_resize(model: NAIGN) -> Resize:
    """How pictures were brought to the model's size. Raises InputError for a header that no training wrote."""
    try:
        return _resize(model.metadata.get("config", {}).get("data", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the model has a header that no training wrote: {error}") from None


def _resize(data: Mapping[str, Any]) -> Resize:
    """Of the section `data` of a header, without chance."""
    texts = ("size", "fit", "scale", "ratio", "interpolation")
    given: dict[str, Any] = {name: str(data[name]) for name in texts if name in data}
    config = DataConfig(crop=int(data.get("crop", 0)), **given)
    check_fields(config, "data")
    return parse_resize(config).central()
