"""Where does the time of a round go?

    python benchmarks/round.py --to benchmarks/results/round

Trains MNIST's recipe for a few rounds on two ranks, DDP over gloo, with `--profile.rounds`, and reads the traces that
this leaves (any trace of a round can be given instead, with `--trace`). Prints and writes a table of what the ranks'
main threads did in each phase (round.md) and the round as a picture, a line of phases and a line of work for each rank
(round.png).
"""

import gzip
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
PHASES = {"take": "#9ecae1", "match": "#fdae6b", "fit": "#a1d99b"}
KINDS = {  # by the start of the name of an operation that is in no other
    "forward": ("#2ca02c", ("DistributedDataParallel.forward", "aten::conv", "aten::group_norm", "aten::silu",
                            "aten::linear", "aten::upsample", "aten::tanh", "aten::relu")),
    "backward": ("#1f77b4", ("autograd::",)),
    "messages": ("#d62728", ("gloo:", "nccl:", "torch.distributed", "c10d::")),
    "optimizer": ("#9467bd", ("Optimizer.", "aten::_foreach", "aten::_fused")),
    "search": ("#ff7f0e", ("aten::mm", "aten::matmul", "aten::addmm", "aten::nonzero", "aten::topk")),
    "other operations": ("#8c8c8c", ("",)),
}  # fmt: skip
GAP = "outside of torch"


@dataclass(kw_only=True, slots=True)
class Settings:
    """Draw one round of a run, from its trace."""

    trace: tuple[Path, ...] = ()
    """Traces of one round, a rank each (runs/x/profile/*.json.gz); default: train, and take those."""
    data: Path = ROOT / "data/mnist"
    """Packed data to train on."""
    options: tuple[str, ...] = ()
    """More settings of the training, such as train.images=4096."""
    to: Path | None = None
    """Where to write, without an ending; default: print only."""
    width: int = 1600
    """Of the picture, pixels."""


@dataclass(slots=True)
class Span:
    name: str
    start: float
    end: float
    """Milliseconds since the round began."""


def traced(settings: Settings, folder: Path) -> list[Path]:
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--quiet"),
        *("--config_file", str(ROOT / "launch/cpu.yaml"), "--main_process_port", "0"),
        *(str(ROOT / "pipeline/train.py"), "--config", str(ROOT / "configs/mnist_imle.yaml")),
        *(f"--data.path={settings.data}", f"--run.path={folder}", "--train.images=12288", "--report.pictures=0"),
        "--profile.rounds=4",
        *(f"--{option}" for option in settings.options),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sorted((folder / "profile").glob("*.json.gz"))


def read(file: Path) -> tuple[list[Span], list[Span]]:
    """The phases of the round, and the outermost operations of the main thread in them, both in their order."""
    with gzip.open(file) as opened:
        events: list[dict[str, Any]] = [event for event in json.load(opened)["traceEvents"] if event.get("ph") == "X"]
    whole = next(event for event in events if event["name"].startswith("round "))
    mine = sorted((event for event in events if event["tid"] == whole["tid"]), key=lambda e: (e["ts"], -e["dur"]))
    phases, work, end = list[Span](), list[Span](), whole["ts"]
    for event in mine:
        span = Span(event["name"], (event["ts"] - whole["ts"]) / 1e3, (event["ts"] + event["dur"] - whole["ts"]) / 1e3)
        if event["name"] in PHASES and event["cat"] == "user_annotation":
            phases.append(span)
        elif event is not whole and event["ts"] >= end and event["ts"] < whole["ts"] + whole["dur"]:
            work.append(span)
            end = event["ts"] + event["dur"]
    return phases, work


def kind(name: str) -> str:
    return next(kind for kind, (_, starts) in KINDS.items() if name.startswith(starts))


def table(ranks: list[tuple[list[Span], list[Span]]]) -> str:
    """Milliseconds of each kind in each phase, the mean of the ranks."""
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for phases, work in ranks:
        for phase in phases:
            inside = [span for span in work if phase.start <= span.start < phase.end]
            for span in inside:
                spent[phase.name][kind(span.name)] += (span.end - span.start) / len(ranks)
            covered = sum(span.end - span.start for span in inside)
            spent[phase.name][GAP] += (phase.end - phase.start - covered) / len(ranks)
    columns = [*KINDS, GAP]
    rows = ["| ms | " + " | ".join(columns) + " | in all |", "| --- " * (len(columns) + 2) + "|"]
    for name, found in spent.items():
        cells = " | ".join(f"{found[column]:.1f}" for column in columns)
        rows.append(f"| {name} | {cells} | {sum(found.values()):.1f} |")
    return "\n".join(rows)


def picture(ranks: list[tuple[list[Span], list[Span]]], width: int) -> Image.Image:
    """Time to the right; for each rank its phases above its work."""
    edge, line = 60, 34
    end = max(phases[-1].end for phases, _ in ranks)
    height = 60 + len(ranks) * (2 * line + 24) + 30
    drawn = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(drawn)

    def across(at: float) -> float:
        return edge + (width - 2 * edge) * at / end

    def box(span: Span, top: int, colour: str) -> None:
        left, right = across(span.start), across(span.end)
        draw.rectangle([left, top, max(left, right - 1), top + line - 3], fill=colour)

    left = edge
    for name, colour in [*((name, colour) for name, (colour, _) in KINDS.items()), (GAP, "#eeeeee")]:
        draw.rectangle([left, 16, left + 12, 28], fill=colour)
        draw.text((left + 18, 16), name, fill="black")
        left += 40 + int(draw.textlength(name))
    for rank, (phases, work) in enumerate(ranks):
        top = 50 + rank * (2 * line + 24)
        draw.text((8, top + 8), f"rank {rank}", fill="black")
        for phase in phases:
            box(phase, top, PHASES[phase.name])
            text = f"{phase.name} {phase.end - phase.start:.0f} ms"
            if draw.textlength(text) + 8 < across(phase.end) - across(phase.start):
                draw.text((across(phase.start) + 4, top + 8), text, fill="black")
        box(Span("", phases[0].start, phases[-1].end), top + line, "#eeeeee")
        for span in work:
            box(span, top + line, KINDS[kind(span.name)][0])
    tick = 10 ** math.floor(math.log10(end))
    for at in range(0, math.floor(end) + 1, max(1, tick // 5)):
        draw.line([(across(at), height - 34), (across(at), height - 28)], fill="black")
        draw.text((across(at), height - 24), f"{at} ms", fill="black", anchor="ma")
    return drawn


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as place:
        files = list(settings.trace) or traced(settings, Path(place) / "run")
        ranks = [read(file) for file in files]
    text = (
        f"`python benchmarks/round.py`: one round of {len(ranks)} ranks, main threads, mean of the ranks.\n\n"
        + table(ranks)
    )
    print(text)
    if settings.to:
        settings.to.parent.mkdir(parents=True, exist_ok=True)
        settings.to.with_suffix(".md").write_text(text + "\n")
        picture(ranks, settings.width).save(settings.to.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Settings))
