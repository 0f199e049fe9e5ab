"""The network f and what it is trained to do: networks, objectives, priors, encoders, and a trained model.

Names are imported when they are first used: a program that needs the settings alone does not wait for the rest.
"""

from typing import TYPE_CHECKING

from pipeline import lazy_face

if TYPE_CHECKING:
    from pipeline.model.encoders import load_encoder
    from pipeline.model.losses import Batch, ObjectiveConfig
    from pipeline.model.naign import NAIGN
    from pipeline.model.networks import NetworkConfig, build_network
    from pipeline.model.scale import scaled

_FILES = {"encoders": "load_encoder", "losses": "Batch ObjectiveConfig"}
_FILES |= {"naign": "NAIGN", "networks": "NetworkConfig build_network", "scale": "scaled"}
__all__, __getattr__ = lazy_face(__name__, _FILES)
