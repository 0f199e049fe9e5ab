"""Checkpoints for tests, written as training writes them."""

import shutil
import tempfile
from functools import partial
from pathlib import Path

from naign.checkpoint.writer import Writer


def write_checkpoint(
    folder,  # .../checkpoints/step-00001234
    fill,  # writes the files into the folder it is given
):
    """Write a complete checkpoint by a Writer of one rank."""
    with tempfile.TemporaryDirectory() as made:
        source = Path(made)
        fill(source)
        writer = Writer(folder.parent.parent)
        files = {}
        for path in source.rglob("*"):
            if path.is_file():
                files[path.relative_to(source).as_posix()] = partial(shutil.copyfile, path)
        writer.start(folder.name, files)
        assert writer.join()


def start_model(writer, name):
    """Start to write a checkpoint of one small file."""

    def write(file):
        file.write_bytes(b"m")

    writer.start(name, {"model.bin": write})
