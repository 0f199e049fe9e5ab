"""What the ranks of tests/neighbours/test_ranks.py run."""

import os
from pathlib import Path

import pytest
from accelerate import Accelerator

from naign.neighbours import CopiesOptions
from naign.neighbours.copies import copies
from tests.neighbours.planted import audit, small_blocks

FOLDER = "NAIGN_TEST_AUDIT"  # variable: the folder with data/ and model/


def audits(rank, world):
    """Both audits, in pixels and in features; their files are in the folder of that world size."""
    folder = Path(os.environ[FOLDER])
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        audit(str(folder / "data"), folder / f"{world}/pixels")
        options = CopiesOptions(encoder="digits-cnn64", samples=700, to=str(folder / f"{world}/copies"))
        copies(str(folder / "model"), options, Accelerator(cpu=True))
    return [str(rank)]
