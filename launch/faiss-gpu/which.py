"""Print which GPU build of FAISS fits the installed torch, for pip: see pyproject.toml beside this file."""

import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

VERSION = "1.15.1"  # that of pyproject.toml


def build(cuda: str | None) -> str:
    """The build for torch's CUDA ("12.8"; None: torch has none); "" if none fits.

    faiss-gpu-cuvs needs the libraries of CUDA 13.2, which a torch for 13.0 excludes: there faiss-gpu brings those of
    CUDA 12 along.
    """
    major, minor = map(int, (cuda or "0.0").split(".")[:2])
    if major not in (12, 13):
        return ""
    return f"{'faiss-gpu-cuvs' if (major, minor) >= (13, 2) else 'faiss-gpu'}=={VERSION}"


if __name__ == "__main__":
    spec = find_spec("torch")  # read, not imported: an image that is being built lacks what torch needs
    cuda = run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] if spec and spec.origin else None
    print(build(cuda) or sys.exit(f"no GPU build of FAISS fits: the installed torch is built for CUDA {cuda}"))
