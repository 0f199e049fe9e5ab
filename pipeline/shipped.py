"""The files of configs/, launch/ and k8s/: beside this package in a checkout, inside it where a wheel was installed."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(path: str) -> Path:
    """The place of `path`, such as configs/mnist.yaml, whether it exists or not."""
    inside = _PACKAGE / path
    return inside if (_PACKAGE / Path(path).parts[0]).is_dir() else _PACKAGE.parent / path
