"""What other programs import: a trained model, the exact nearest candidate over all ranks, and batches of a data set.

from naign import NAIGN, nearest, open_dataset
"""

from importlib.metadata import PackageNotFoundError, version

from pipeline.match.across_ranks import nearest
from pipeline.model.naign import NAIGN
from pipeline.training.batches import open_dataset

__all__ = ["NAIGN", "nearest", "open_dataset"]

try:
    __version__ = version("naign")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"
