"""The network f and what it is trained to do: networks, objectives, laws of latents, encoders, and a trained model.

Names are imported when they are first used: a program that needs the settings alone does not wait for the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.model.encoders import load_encoder
    from pipeline.model.losses import Batch, ObjectiveConfig
    from pipeline.model.naign import NAIGN
    from pipeline.model.networks import NetworkConfig, build_network

__all__ = ["NAIGN", "Batch", "NetworkConfig", "ObjectiveConfig", "build_network", "load_encoder"]

_FILES = {"NAIGN": "naign", "NetworkConfig": "networks", "build_network": "networks", "load_encoder": "encoders"}
_FILES |= dict.fromkeys(("Batch", "ObjectiveConfig"), "losses")


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
