"""Checkpoints for tests, written as training writes them."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from naign.checkpoint.writer import Writer


def write_checkpoint(
    folder: Path,  # .../checkpoints/step-00001234
    fill: Callable[[Path], object],  # writes the files into the folder it is given
) -> None:
    """Write a complete checkpoint by a Writer of one rank."""
    with tempfile.TemporaryDirectory() as made:
        source = Path(made)
        fill(source)
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        writer = Writer(folder.parent.parent, rank=0, world=1, keep=0, remote="")
        writer.start(
            folder.name,
            lambda: None,
            {name: lambda file, name=name: shutil.copyfile(source / name, file) for name in names},
        )
        assert writer.join()
