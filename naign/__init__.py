"""What other programs import: a trained model, the exact nearest candidate over all ranks, and batches of a data set.

from naign import NAIGN, nearest, open_dataset
"""

from pipeline import find_version
from pipeline.match.across_ranks import nearest
from pipeline.model.naign import NAIGN
from pipeline.training.batches import open_dataset

__all__ = ["NAIGN", "nearest", "open_dataset"]

__version__ = find_version()
