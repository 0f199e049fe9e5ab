"""Data sets: what can be packed, how it lies in a store, and the rounds of images that each rank trains on.

Names are imported when they are first used: a program that needs a manifest alone does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.dataset import DataConfig, check_config, image_shape
    from pipeline.data.decode import scaled
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.format.writer import pack
    from pipeline.data.loader import Stream, Taken, read_split
    from pipeline.data.order import rank_rows
    from pipeline.data.sources.catalog import load

_FILES = {
    **dict.fromkeys(("DataConfig", "check_config", "image_shape"), "dataset"),
    **dict.fromkeys(("Stream", "Taken", "read_split"), "loader"),
    "Manifest": "format.manifest",
    "pack": "format.writer",
    "load": "sources.catalog",
    "scaled": "decode",
    "rank_rows": "order",
}

__all__ = [
    "DataConfig",
    "Manifest",
    "Stream",
    "Taken",
    "check_config",
    "image_shape",
    "load",
    "pack",
    "rank_rows",
    "read_split",
    "scaled",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
