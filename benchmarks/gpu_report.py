"""The settings of gpu.py, and the lines that its parts report."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from trained import page, write

Part = Literal[
    *("doctor", "random", "launches", "autocast", "search", "determinism", "resume"),
    *("compiled", "memory", "full", "step", "match", "train"),
]


@dataclass(kw_only=True, slots=True)
class Settings:
    """Try and time everything on one GPU."""

    to: Path | None = None
    """Where to write, without an ending; default: benchmarks/results/gpu-, and the card's name."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to do."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where."""
    data: Path = Path("data/cifar10")
    """CIFAR-10, packed; it is fetched and packed there if it is missing."""
    minutes: float = 25.0
    """Time for all parts. `train` takes what the others leave; a part that would begin later is left out."""
    small: bool = False
    """Small sizes, to see that all works."""


class Report:
    """Lines: part, what, value, what it must be."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.lines = settings, list[dict[str, Any]]()
        self.device = torch.device(settings.device)
        self.part, self._end = "", time.monotonic() + 60 * settings.minutes

    def left(self) -> float:
        """Seconds until `minutes` are over."""
        return self._end - time.monotonic()

    def say(self, what: str, value: str, must: str = "", holds: bool = True) -> None:
        """Print a line and keep it."""
        self.lines.append({"part": self.part, "what": what, "value": value, "must": must, "holds": holds})
        said = f" (must: {must})" * bool(must) + "  WRONG" * (not holds)
        print(f"{self.part:12} {what}: {value}{said}", flush=True)

    def write(self, to: Path, card: str) -> None:
        rows = [[line["part"], line["what"], line["value"], line["must"] or "-"] for line in self.lines]
        rows = [[*row, "yes" if line["holds"] else "**no**"] for row, line in zip(rows, self.lines, strict=True)]
        text = page(f"On {card}", ["part", "", "found", "must be", "holds"], rows)
        write(to, text, {"card": card, "lines": self.lines})

    def seconds(self, call: Callable[[], Any], repeats: int = 10) -> float:
        """The median, after three that are not counted."""
        found = []
        for number in range(3 + repeats):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - begin)
            if number == 3 and found[-1] > 1:
                break
        return statistics.median(found[3:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
