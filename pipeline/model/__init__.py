"""The network f and what it is trained to do: networks, objectives, priors, encoders, and a trained model.

Names are imported when they are first used: a program that needs the settings alone does not wait for the rest.
"""

from typing import TYPE_CHECKING

from pipeline import lazy_face

if TYPE_CHECKING:
    from pipeline.model.naign import NAIGN
    from pipeline.model.scale import scaled

__all__, __getattr__ = lazy_face(__name__, {"naign": "NAIGN", "scale": "scaled"})
