"""Callbacks: what another package does after a round or a checkpoint (docs/extend.md).

They are entry points of the group `naign.callbacks` that train.callbacks names, or an argument of `train`.
"""

from collections.abc import Callable
from pathlib import Path

from naign.errors import require
from naign.settings.registry import listed, lookup
from naign.training.trainer import Trainer


class Callback:
    """Base of callbacks. An entry point is a subclass, or another function without arguments that returns one."""

    def on_round(self, run: Trainer, values: dict[str, float]) -> None:
        """Called on every rank after each round, and before its report: what rank 0 adds to `values` is reported."""

    def on_checkpoint(self, run: Trainer, folder: Path) -> None:
        """Called on rank 0 once the checkpoint in `folder` is complete, and in the bucket if there is one. It runs in
        the background, so it must leave the network to the next rounds and read the files.
        """


def find_callbacks(names: str) -> list[Callback]:
    """The callbacks of train.callbacks, names with commas between them. Raises InputError for an unknown one."""
    callbacks = []
    for name in listed(names):
        build: Callable[[], Callback] = lookup("train.callbacks", name, {}, "naign.callbacks")
        callback = build()
        is_one = isinstance(callback, Callback)
        require((is_one, f"the callback '{name}' is a {type(callback).__name__}, not a Callback: fix the package"))
        callbacks.append(callback)
    return callbacks


def call(run: Trainer, hook: str, values: dict[str, float] | Path) -> None:
    """Call that method of each callback, which may add numbers to `values`."""
    for callback in run.callbacks:
        getattr(callback, hook)(run, values)
    if isinstance(values, dict):
        for name, value in values.items():
            values[name] = float(value)  # not text
