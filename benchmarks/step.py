"""What training costs beyond its mathematics: a step of the fit, a checkpoint, a resumption.

    python benchmarks/step.py --to benchmarks/results/step

prints and writes three tables (step.md) and what was measured (step.json). Images are random, stored as MNIST's are;
the network and all settings are the program's defaults where nothing else is said. What step.json holds already
stays unless it is measured again: `--parts fit` measures that part alone.

Fit. `naign.training.fit`, on a round with a match whose ids are given, beside the barest loop of the same
mathematics, `fit_bare` in step_processes.py: the same latents, losses, clipping and AdamW, but rows and learning rates
are worked out beforehand, and nothing is watched, counted, summed up or reported. On two gloo ranks ours is what
Accelerate makes of DDP, and the bare loop has torch's DistributedDataParallel. Both train in the same process, each a
network of its own from the same first weights, in turns of a round, 16 steps; who begins changes from turn to turn.
Seconds are medians, of the rank that took longer, and the ratio is the median of the turns' ratios, with its quartiles;
a first turn is not counted. CPU time, of all threads and ranks, is less disturbed by other programs. At the end both
must have the same weights. Memory is what the resident set of a fresh process (the larger of two ranks) grows by at
most from before there is a network, the images and all else being there already, through two rounds; the median of
fresh processes.

Checkpoints. `stands still` is `training.loop.checkpoint` and what the next step waits until all it would change is
copied; `written in` is from then on to the manifest, in the background, with copying, sync to disk and SHA-256, while a
round is fitted. What that takes of the processor slows the round down: `a round` is the median of those beside a
checkpoint and of those between, in turns. Medians of several; the first, whose copies take new memory from the system,
stands in parentheses.

Resumption. From the start of a fresh process to the end of its first step: imports, checking the checkpoint, reading it
and the data, and the first round's match. The run was left with a checkpoint as a kill leaves it, is resumed, and is
killed again after that step. The step is seen from outside, by the count of the progress bar, which moves with it.
Files are in the page cache. Median of several starts, and the longest.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import tyro
from step_processes import WHO, Record, alternate, first_step, on_ranks, peak, random_images, write
from trained import table

from naign.config import Config
from naign.errors import InputError, exit_on_input_error
from naign.model.losses import NaignConfig
from naign.model.networks import ConvConfig
from naign.model.prior.noise import SmoothConfig

Part = Literal["fit", "checkpoint", "resume"]

ROOT = Path(__file__).parents[1]
WORLDS = {"one process, 2 threads": 1, "two ranks of one thread, DDP": 2}
LARGE = ConvConfig(width=256, depth=2)
"""For 64x64 images in colour."""
STARTS = {
    "`python pipeline/train.py`": [sys.executable],
    "`accelerate launch pipeline/train.py`": [sys.executable, "-m", "accelerate.commands.launch", "--quiet"],
}


@dataclass(kw_only=True, slots=True)
class Settings:
    """Measure what training costs beyond its mathematics."""

    to: Path | None = None
    """Where to write, without an ending; default: print only."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to measure."""
    pairs: int = 40
    """Turns of each that fits."""
    memory: int = 3
    """Fresh processes of each that fits, for memory."""
    checkpoints: int = 5
    """Of each network, after the first."""
    starts: int = 5
    """Of each way to start, after the one that is not counted."""
    scratch: Path = Path(tempfile.gettempdir()) / "naign-step"
    """For data sets and checkpoints, up to 3 GB; on the disk that is to be measured."""
    quick: bool = False
    """A few turns, small networks, processes forked instead of started, to see that all works."""

    def __post_init__(self) -> None:
        if self.quick:
            self.pairs = self.memory = self.checkpoints = self.starts = 1


def main(settings: Settings) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    machine = {
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        **{name: version(name) for name in ("torch", "accelerate")},
    }
    results: Record = {"machine": machine}
    file = settings.to.with_suffix(".json") if settings.to else None
    if file and file.exists():
        results = json.loads(file.read_text())
        if results["machine"] != machine:
            raise InputError(f"{file} was measured on another machine: remove it, or write --to another place")
    settings.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
        bench = Bench(settings, Path(scratch))
        for part in settings.parts:
            results[part] = {"fit": bench.fits, "checkpoint": bench.checkpoints, "resume": bench.resumptions}[part]()
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(results, indent=1) + "\n")
                file.with_suffix(".md").write_text(page(results))
    print(page(results))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """Measures, each measurement in processes of its own."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings, self.scratch = settings, scratch
        self.method = "forkserver" if settings.quick else "spawn"
        self.config = Config(objective=NaignConfig(imle=1.0, denoising=0.0), prior=SmoothConfig())
        if settings.quick:
            self.config.model = ConvConfig(width=8, code=16)
            self.config.match.round = 512
        self.config.data.path = self.packed((1, 28, 28), 4 * self.config.match.round if settings.quick else 60_000)
        self.config.run.path = str(scratch / "run")

    def packed(self, shape: tuple[int, ...], count: int) -> str:
        return random_images(self.scratch / f"images{shape[1]}", shape, count)

    def fits(self) -> Record:
        """Seconds and memory of both, and whether they end with the same weights."""
        settings, found = self.settings, Record()
        for title, world in WORLDS.items():
            turns = on_ranks(world, self.method, alternate, self.config, settings.pairs)
            seconds = {
                who: [max(turn) for turn in zip(*(rank["seconds"][who] for rank in turns), strict=True)] for who in WHO
            }
            cpu = {who: [sum(turn) for turn in zip(*(rank["cpu"][who] for rank in turns), strict=True)] for who in WHO}
            row = {"ratio": ratio(seconds), "cpu": ratio(cpu), "equal": all(rank["equal"] for rank in turns)}
            say(f"{title}: {row['ratio'][1]:.3f} times bare (CPU time {row['cpu'][1]:.3f}), same bits: {row['equal']}")
            peaks: dict[str, list[int]] = {who: [] for who in WHO}
            for _ in range(settings.memory):
                for who in WHO:
                    peaks[who].append(max(on_ranks(world, self.method, peak, self.config, who)))
                    say(f"  {who}: {peaks[who][-1] / 1e6:.1f} MB")
            for who in WHO:
                row[who] = {
                    "seconds": statistics.median(seconds[who]),
                    "least": min(seconds[who]),
                    "memory": statistics.median(peaks[who]),
                }
            found[title] = row
        return found

    def checkpoints(self) -> Record:
        """Of both networks."""
        large = deepcopy(self.config)
        large.model = ConvConfig(width=16, depth=1) if self.settings.quick else LARGE
        large.match.round = large.train.batch = 4
        large.data.path = self.packed((3, 64, 64), 8)
        found = {}
        for title, config in (("defaults", self.config), ("width 256, depth 2, 64x64 in colour", large)):
            (found[title],) = on_ranks(1, self.method, write, config, self.settings.checkpoints)
            say(f"{title}: {found[title]}")
        return found

    def resumptions(self) -> dict[str, list[float]]:
        """Seconds to the first step, by way to start."""
        rounds = 3
        options = [
            *("--config", str(ROOT / "configs/mnist_imle.yaml"), "--data.path", self.config.data.path),
            *("--run.path", str(self.scratch / "resumed"), "--checkpoint.rounds=1", "--checkpoint.keep=0"),
            *(f"--train.images={rounds * self.config.match.round}", f"--match.round={self.config.match.round}"),
            *(f"--model.width={self.config.model.width}", f"--model.code={self.config.model.code}"),
            "--report.pictures=0",
        ]
        command = [str(ROOT / "pipeline/train.py"), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "TQDM_MININTERVAL": "0.01"}
        subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
        newest = max((self.scratch / "resumed/checkpoints").iterdir())
        shutil.rmtree(newest)
        seconds: dict[str, list[float]] = {title: [] for title in STARTS}
        for number in range(int(self.settings.quick), 1 + self.settings.starts):  # 0 is not counted
            for title, start in STARTS.items():
                taken = first_step([*start, *command], environment)
                say(f"{title}: {taken:.2f} s")
                if number:
                    seconds[title].append(taken)
        return seconds


def ratio(values: dict[str, list[float]]) -> list[float]:
    """The quartiles of the turns' ratios."""
    found = [ours / bare for ours, bare in zip(values["ours"], values["bare"], strict=True)]
    return statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else 3 * found


def page(results: Record) -> str:
    machine, median = results["machine"], statistics.median
    parts = [
        f"`python benchmarks/step.py --to benchmarks/results/step` on {machine['processor']},\n"
        f"{machine['cores']} cores, torch {machine['torch']}, accelerate {machine['accelerate']}.\n"
        "The head of the script says what was measured, and how to repeat it."
    ]
    if "fit" in results:
        rows = [["fit", "ours, a step", "bare", "ratio", "of CPU time", "ours, memory", "bare", "ratio", "weights"]]
        for title, row in results["fit"].items():
            ours, bare = row["ours"], row["bare"]
            rows.append([title, *(f"{1e3 * one['seconds']:.1f} ms" for one in (ours, bare))])
            rows[-1] += [f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in (row["ratio"], row["cpu"])]
            rows[-1] += [f"{one['memory'] / 1e6:.1f} MB" for one in (ours, bare)]
            rows[-1] += [f"{ours['memory'] / bare['memory']:.3f}", "the same bits" if row["equal"] else "close"]
        parts.append(table(rows[0], rows[1:]))
    if "checkpoint" in results:
        rows = [["checkpoint", "parameters", "size", "stands still (first)", "written in (first)", "share"]]
        rows[0] += ["a round beside it", "between"]
        for title, row in results["checkpoint"].items():
            (first, *still), (slow, *written) = row["still"], row["written"]
            rows.append([title, f"{row['parameters'] / 1e6:.2f} M", f"{row['bytes'] / 1e6:,.1f} MB"])
            rows[-1] += [f"{1e3 * median(still):.1f} ms ({1e3 * first:.1f})"]
            rows[-1] += [f"{1e3 * median(written):,.0f} ms ({1e3 * slow:,.0f})"]
            rows[-1] += [f"{100 * median(still) / median(written):.1f} %"]
            rows[-1] += [f"{1e3 * median(row[which][1:]):,.0f} ms" for which in ("beside", "alone")]
        parts.append(table(rows[0], rows[1:]))
    if "resume" in results:
        rows = [["resumption", "to the end of the first step", "longest"]]
        rows += [
            [title, f"{median(seconds):.1f} s", f"{max(seconds):.1f} s"] for title, seconds in results["resume"].items()
        ]
        parts.append(table(rows[0], rows[1:]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    with exit_on_input_error("step"):
        main(tyro.cli(Settings))
