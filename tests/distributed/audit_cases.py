"""What the ranks of tests/neighbours/test_ranks.py run."""

import os
from pathlib import Path

import pytest
from accelerate import Accelerator

from naign.neighbours import CopiesOptions
from naign.neighbours.copies import copies
from tests.neighbours.planted import small_blocks

FOLDER = "NAIGN_TEST_AUDIT"  # variable: the folder with data/ and model/


def audits(rank, world):
    """Copies, whose files are in the folder of that world size."""
    folder = Path(os.environ[FOLDER])
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        options = CopiesOptions(samples=700, to=str(folder / str(world)))
        copies(str(folder / "model"), options, Accelerator(cpu=True))
    return [str(rank)]
