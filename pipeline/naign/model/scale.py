"""The scale of images in training: see data/scale.py."""

from naign.data.scale import scaled as scaled
