"""Data sets: what can be packed, how it lies in a store, and the rounds of images that each rank trains on.

Names are imported when they are first used: a program that needs a manifest alone does not wait for torch.
"""

from typing import TYPE_CHECKING

from pipeline import lazy_face

if TYPE_CHECKING:
    from pipeline.data.dataset import DataConfig, check_config, lists_data_sets
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.format.writer import pack
    from pipeline.data.loader import Rows, Stream, read_split
    from pipeline.data.order import rank_rows
    from pipeline.data.sources.catalog import load

_FILES = {"dataset": "DataConfig check_config lists_data_sets", "order": "rank_rows"}
_FILES |= {"loader": "Rows Stream read_split", "format.manifest": "Manifest", "format.writer": "pack"}
__all__, __getattr__ = lazy_face(__name__, _FILES | {"sources.catalog": "load"})
