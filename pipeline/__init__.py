"""NAIGN: non-adversarial idempotent generative networks, trained at scale."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("naign")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+checkout"
