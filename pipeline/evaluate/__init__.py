"""Evaluation of a trained network: Frechet distance, coverage, restoration, density, a report; runs side by side.

Names are imported when they are first used: `naign runs` does without torch.
"""

from typing import TYPE_CHECKING

from pipeline import lazy_face

if TYPE_CHECKING:
    from pipeline.evaluate.coverage import NEIGHBOURS
    from pipeline.evaluate.run import evaluate

__all__, __getattr__ = lazy_face(__name__, {"coverage": "NEIGHBOURS", "run": "evaluate"})
