"""Checkpoints: folders of files with a manifest written last, here and in a bucket.

Names are imported when they are first used: the writer imports torch, which commands such as `naign fetch` do without.
"""

from typing import TYPE_CHECKING

from pipeline import lazy_face

if TYPE_CHECKING:
    from pipeline.checkpoint.bucket import download, fetch_file, fetch_shown, newest_first, take_over
    from pipeline.checkpoint.manifest import MANIFEST
    from pipeline.checkpoint.writer import Write, Writer, is_complete, newest_checkpoint, passed_over, set_aside

_FILES = {"bucket": "download fetch_file fetch_shown newest_first take_over", "manifest": "MANIFEST"}
_FILES |= {"writer": "Write Writer is_complete newest_checkpoint passed_over set_aside"}
__all__, __getattr__ = lazy_face(__name__, _FILES)
