"""Small packed data sets."""

from pathlib import Path

import pytest
from numbered import numbered

from pipeline.data.shards import pack


@pytest.fixture
def packed(tmp_path: Path) -> str:
    """23 training images in 4 shards of 5, 6, 6, 6; 5 test images in 4 shards."""
    path = str(tmp_path / "packed")
    pack(numbered(), path, shards=4, progress=False)
    return path
