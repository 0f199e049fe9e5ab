"""What a trained network can do: Frechet distance, coverage, restoration, density, and a report page."""

from pipeline.evaluate.coverage import NEIGHBOURS
from pipeline.evaluate.run import evaluate
