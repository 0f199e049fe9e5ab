"""The manifest of a checkpoint: which files it has, with size and SHA-256. Read as what a stranger may have written."""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

Entries = dict[str, dict[str, Any]]
"""Of a manifest: bytes and sha256 by name."""


def is_whole(file: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is what its manifest says."""
    found = file.lstat() if file.exists() else None
    if found is None or not stat.S_ISREG(found.st_mode):
        return False
    return bool(found.st_size == entry["bytes"] and sha256(file) == entry["sha256"])


def read_manifest(text: bytes) -> Entries:
    """What a manifest says. Raises ValueError where it is none, or speaks of files outside its folder."""
    try:
        files = json.loads(text)["files"]
        for name, entry in files.items():
            parts = Path(name).parts
            if not parts or ".." in parts or Path(name).is_absolute() or name == MANIFEST or "\0" in name:
                raise ValueError(f"a file named {name!r}")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"no size and hash of {name!r}")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not files:
        raise ValueError("no files")
    return dict(files)


def sha256(file: Path) -> str:
    """Of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
