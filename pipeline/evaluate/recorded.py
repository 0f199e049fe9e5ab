"""What a model file says of its training: the data, and the encoders."""

from dataclasses import replace

from pipeline.data.dataset import DataConfig, image_shape
from pipeline.data.format.manifest import Manifest
from pipeline.errors import InputError
from pipeline.model.naign import NAIGN
from pipeline.storage.store import use_endpoint


def recorded(model: NAIGN, folder: str, data: str | None) -> tuple[str, Manifest, int, list[str]]:
    """From the model's header: path and manifest of the data set to measure on, the side of the crops trained on (0:
    whole images), and the encoders of the training.

    Raises InputError for a header that no training wrote, and if the data set is not there or does not fit the model.
    """
    try:
        config = model.metadata.get("config", {})
        recorded, space = config.get("data", {}), config.get("match", {}).get("space", {})
        used = [str(part["encoder"]) for part in (config.get("objective", {}), space) if part.get("encoder")]
        path, crop = str(data or recorded.get("path") or ""), int(recorded.get("crop", 0))
        use_endpoint(str(recorded.get("endpoint", "")))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the model in {folder} has a header that no training wrote: {error}") from None
    if not path:
        raise InputError(f"{folder} does not say what it was trained on: give the packed data set as --data PATH")
    try:
        manifest = Manifest.load(path)
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
    return path, manifest, crop, used
