"""Checkpoints: folders of files with a manifest written last, here and in a bucket."""

from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.bucket import download, fetch_newest, fetch_shown, newest_first, take_over
from pipeline.checkpoint.manifest import MANIFEST

if TYPE_CHECKING:
    from pipeline.checkpoint.writer import Write, Writer, is_complete, newest_checkpoint, passed_over, set_aside

__all__ = [
    "MANIFEST",
    "Write",
    "Writer",
    "download",
    "fetch_newest",
    "fetch_shown",
    "is_complete",
    "newest_checkpoint",
    "newest_first",
    "passed_over",
    "set_aside",
    "take_over",
]


def __getattr__(name: str) -> Any:
    """The writer imports torch, which commands such as `naign fetch` do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.checkpoint import writer

    return getattr(writer, name)
