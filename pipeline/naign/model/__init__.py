"""The network f and what it is trained to do: networks, objectives, priors, encoders, and a trained model."""

from naign.model.naign import NAIGN
