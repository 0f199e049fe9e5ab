"""What can be known in the first second of a run: whether it may write where it will, and whether there is room."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.data.share import BLOCK_BYTES, SLOTS
from pipeline.data.store import open_store
from pipeline.errors import InputError, Unavailable

CHECKPOINTS = 3
"""For which there should be room: the two that are kept, and the one that is being written."""

SHARED_MEMORY = "/dev/shm"

PROBE = "preflight"
"""A file that is written to see that a bucket can be."""


def preflight(
    *,
    run: str,  # run.path
    remote: str,  # run.remote; '': none
    workers: int,  # data.workers, a rank
    checkpoint_bytes: int,  # of a whole checkpoint, all ranks' files
    say: Callable[[str], None],  # what was found, a line each
) -> list[str]:
    """Warnings, each with its remedy. Leaves nothing behind but, where `remote` is a local folder, that folder.

    Raises InputError for what makes the run impossible, and Unavailable if the remote's server stays out of reach.
    """
    place = check_folder(run)
    warnings = check_disk(run, place, checkpoint_bytes, say)
    if workers > 0:
        warnings += check_shared_memory(workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), say)
    if remote:
        check_remote(remote)
        say(f"run.remote {remote} can be written")
    return warnings


def check_folder(run: str) -> Path:
    """The nearest folder above `run`, or itself, that exists. InputError if nothing can be written there."""
    place = Path(run).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"naign")
    except OSError as error:
        raise InputError(
            f"run.path '{run}' cannot be written: {place}: {(error.strerror or str(error)).lower()}: "
            "choose another --run.path"
        ) from None
    return place


def check_disk(run: str, place: Path, checkpoint_bytes: int, say: Callable[[str], None]) -> list[str]:
    """A warning if CHECKPOINTS do not fit on the disk of `place`; InputError if not even one does."""
    free = shutil.disk_usage(place).free
    found = f"run.path '{run}' has {size(free)} free, a checkpoint takes {size(checkpoint_bytes)}"
    say(found)
    if free < checkpoint_bytes:
        raise InputError(f"{found}: free some, or choose another --run.path")
    if free < CHECKPOINTS * checkpoint_bytes:
        return [
            f"{found}: {size(CHECKPOINTS * checkpoint_bytes)} would hold the {CHECKPOINTS - 1} that are kept and the "
            "one being written: free some, or set --checkpoint.keep=1"
        ]
    return []


def check_shared_memory(workers: int, ranks: int, say: Callable[[str], None]) -> list[str]:
    """A warning if the blocks of the workers of this machine's ranks do not fit into its shared memory."""
    if not os.path.isdir(SHARED_MEMORY):
        return []
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, workers * ranks * SLOTS * BLOCK_BYTES
    found = f"{SHARED_MEMORY} has {size(free)} free, {workers * ranks} workers take up to {size(needed)}"
    say(found)
    if free < needed:
        return [
            f"{found}: give the container more (docker run --shm-size, or in Kubernetes an emptyDir of medium Memory), "
            "or set a lower --data.workers"
        ]
    return []


def check_remote(remote: str) -> None:
    """Put and delete a small file; InputError as the store says it. Who may not delete keeps old checkpoints, too."""
    store = open_store(remote)
    refused = None
    try:
        store.put(PROBE, b"naign")
    except InputError as error:  # the file may be there, and only not be readable
        refused = error
    with contextlib.suppress(InputError, Unavailable):
        store.delete(PROBE)
    if refused:
        raise refused


def size(bytes: int) -> str:
    """In words, to one decimal."""
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"
