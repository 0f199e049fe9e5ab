"""The first hour with a GPU: are results right, do they repeat bit for bit, and how fast is it.

    python benchmarks/gpu.py                                       # 25 minutes; the page is named after the card
    python benchmarks/gpu.py --device cpu --small --to gpu         # the same on a processor, in two minutes

Each line is printed as soon as it is known; the page (.md) and its numbers (.json) are written after every part. Exits
with 1 if a line is wrong or a part failed. Not run on a card yet. The parts:

    doctor       the checks of `naign doctor`
    random       random numbers beside the CPU's, and what a draw takes
    search       the match beside a float64 oracle on the tests' problems; the premise of its bound
    index        a ShardedIndex beside the same oracle
    groups       a round's match in groups beside the CPU's
    match        a round's search beside torch.cdist, FAISS and the matrix product alone
    repeat       a training, twice: the weights have the same bits
    zero         folder64.yaml under ZeRO-2 beside DDP: losses, memory, speed
    resume       a run that is stopped and continues ends with the weights of one that was not
    trace        kernels that a step launches, and copies between host and device
    compiled     `train.compile` beside without: weights and speed
    memory       the peak of each recipe beside benchmarks/results/budget.md
    full         what a run says where the memory is full
    step         steps of two recipes beside a bare loop of PyTorch
    train        cifar10.yaml in the time that is left, and its measures
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from output import ROOT, Record, check_place, page, write
from torch import Tensor
from trained import environment

from naign import philox
from naign.distributed.connect import repeat_bits
from naign.errors import InputError, exit_on_input_error
from naign.match import Blocks, MatchConfig, bound, match_round, search
from naign.match.exact import load_faiss
from naign.match.sharded import ShardedIndex

sys.path.insert(0, str(ROOT))

Part = Literal[
    "doctor",
    "random",
    "search",
    "index",
    "groups",
    "match",
    "repeat",
    "zero",
    "resume",
    "trace",
    "compiled",
    "memory",
    "full",
    "step",
    "train",
]
SIZES = ((2048, 24_576, 784), (12_800, 51_200, 3072))
"""Queries, candidates and values of the searches that are timed."""


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
    """CIFAR-10 for the part `train`; it is fetched and packed there if it is missing."""
    minutes: float = 25.0
    """Time for all parts. `train` takes what the others leave; a part that would begin later is left out."""
    small: bool = False
    """Small sizes, to see that all works."""


class Report:
    """Lines: part, what, value, what it must be, and whether it is."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings = settings
        self.scratch = scratch
        self.device = torch.device(settings.device)
        self.on_gpu = settings.device == "cuda"
        self.small = settings.small
        self.lines: list[Record] = []
        self.part = ""
        self._end = time.monotonic() + 60 * settings.minutes

    def left(self) -> float:
        """Seconds until `minutes` are over."""
        return self._end - time.monotonic()

    def say(
        self,
        what: str,
        value: object,
        must: str = "",
        holds: bool = True,
    ) -> None:
        """Print a line and keep it."""
        line = {
            "part": self.part,
            "what": what,
            "value": str(value),
            "must": must,
            "holds": holds,
        }
        self.lines.append(line)
        text = f"{self.part:12} {what}: {value}"
        if must:
            text += f" (must: {must})"
        if not holds:
            text += "  WRONG"
        print(text, flush=True)

    def none(self, what: str, count: int, examples: object = "") -> None:
        """A line whose value must be 0."""
        self.say(what, f"{count} {examples}".strip(), "0", count == 0)

    def write(self, to: Path, card: str) -> None:
        rows = []
        for line in self.lines:
            verdict = "yes" if line["holds"] else "**no**"
            cells = [line[key] for key in ("part", "what", "value", "must")]
            rows.append([*cells, verdict])
        titles = ["part", "", "found", "must be", "holds"]
        text = page(f"On {card}", titles, rows)
        write(to, text, {"card": card, "lines": self.lines})

    def seconds(self, call: Callable[[], Any], repeats: int = 10) -> float:
        """The median, after three calls that are not counted."""
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
        if self.on_gpu:
            torch.cuda.synchronize()


def random(report: Report) -> None:
    few = [0, 1, 2, 5, 2**40 + 3, 2**61 + 7]
    ids = torch.tensor(few)
    for shape in ((7,), (3, 32, 32)):
        here = philox.uniform(
            3,
            2,
            ids,
            shape,
            "cpu",
        )
        there = philox.uniform(
            3,
            2,
            ids,
            shape,
            report.device,
        )
        there = there.cpu()
        report.none(f"uniform numbers {shape} other than the CPU's", int((here != there).sum()))
        here = philox.normal(
            3,
            2,
            ids,
            shape,
            "cpu",
        )
        there = philox.normal(
            3,
            2,
            ids,
            shape,
            report.device,
        )
        most = float((here - there.cpu()).abs().max())
        report.say(
            f"normals {shape}, largest difference from the CPU's",
            f"{most:.1e}",
            "below 1e-5",
            most < 1e-5,
        )
    count = 64 if report.small else 512
    rows = torch.arange(count, device=report.device)
    draw = partial(
        philox.normal,
        0,
        0,
        rows,
        (3, 64, 64),
        report.device,
    )
    spent = report.seconds(draw)
    report.say(f"normals of {len(rows)} x 3 x 64 x 64", f"{1e6 * spent:.0f} us")


def searches(report: Report) -> None:
    from tests.match.problems import CASES, oracle

    done = 0
    wrong = []
    stride = 16 if report.small else 1
    for name, (queries, candidates) in list(CASES.items())[::stride]:
        _, rows = oracle(queries, candidates, 3)
        asked = queries.to(report.device)
        pool = candidates.to(report.device)
        for size in (64, 1000):
            found = search(asked, blocks_of(pool, size), 0, neighbours=3)
            done += 1
            ids = found.ids[:, : rows.shape[1]]
            if ids.tolist() != rows.tolist():
                wrong.append(name)
    report.none(f"wrong answers of {done} searches", len(wrong), wrong[:3] or "")
    kinds = [torch.float32]
    if report.on_gpu:
        kinds.append(torch.bfloat16)
    for dtype in kinds:
        errors = [premise(width, dtype, report.device) for width in (64, 792, 3080)]
        worst = max(errors)
        report.say(
            f"error of a product in {dtype}, of what the bound allows",
            f"{worst:.3f}",
            "at most 1",
            worst <= 1,
        )


def index(report: Report) -> None:
    from tests.match.problems import CASES, oracle

    wrong = []
    stride = 16 if report.small else 1
    cases = list(CASES.items())[::stride]
    for name, (queries, candidates) in cases:
        _, rows = oracle(queries, candidates, 3)
        made = ShardedIndex(queries.shape[1])
        made.add(candidates.to(report.device), 0)
        _, ids = made.search(queries.to(report.device), 3)
        if ids[:, : rows.shape[1]].tolist() != rows.tolist():
            wrong.append(name)
    report.none(f"wrong answers of {len(cases)} indexes", len(wrong), wrong[:3] or "")


def groups(report: Report) -> None:
    count = 512 if report.small else 16_384
    config = MatchConfig(
        ratio=2.0,
        round=count,
        group=count // 8,
        block=64,
    )
    images = torch.randn(
        count,
        3,
        32,
        32,
        generator=torch.Generator().manual_seed(1),
    )

    def matched(device: torch.device) -> Tensor:
        def sample(ids: Tensor) -> Tensor:
            return philox.uniform(
                3,
                2,
                ids,
                (3, 32, 32),
                "cpu",
            ).to(device)

        return match_round(images.to(device), sample, config).ids

    ids = matched(report.device)
    report.none("matches other than the CPU's", int((ids != matched(torch.device("cpu"))).sum()))
    begin = time.perf_counter()
    matched(report.device)
    report.say(f"8 groups of {config.group}", f"{time.perf_counter() - begin:.2f} s")


@bound.full_precision()
def premise(
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The largest error of a product of so many coordinates over gamma_2n times the sum of magnitudes."""
    generator = torch.Generator().manual_seed(width)
    worst = 0.0
    for kind in ("normal", "one large", "cancel"):
        a = torch.randn(512, width, generator=generator)
        b = torch.randn(512, width, generator=generator)
        if kind == "one large":
            a = a.abs() * 2.0**-13
            b = b.abs() * 2.0**-12
            a[:, 0] = 1
            b[:, 0] = 1
        if kind == "cancel":
            a[:, width // 2 :] = a[:, : width // 2]
            b[:, width // 2 :] = -b[:, : width // 2]
        a = a.to(device, dtype)
        b = b.to(device, dtype)
        got = product(a, b).double()
        a = a.double()
        b = b.double()
        error = (got - a @ b.T).abs()
        magnitudes = a.abs() @ b.abs().T
        allowed = bound.gamma(2 * width) * magnitudes
        worst = max(worst, float((error / allowed).max()))
    return worst


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in float32 of float32 or bfloat16 rows."""
    if a.dtype == torch.float32:
        return a @ b.T
    return torch.mm(a, b.T, out_dtype=torch.float32)


def blocks_of(rows: Tensor, size: int) -> Blocks:
    return Blocks(
        rows=len(rows),
        make=lambda low, high: rows[low:high],
        size=size,
    )


def match(report: Report) -> None:
    sizes = ((128, 1000, 64),) if report.small else SIZES
    for count, pool, dims in sizes:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        basis = draw(40, dims)
        queries = draw(count, 40) @ basis + 0.3 * draw(count, dims)
        candidates = draw(pool, 40) @ basis + 0.3 * draw(pool, dims)
        queries = queries.to(report.device)
        candidates = candidates.to(report.device)
        calls = peers(queries, candidates)
        calls["this search"] = partial(search, queries, blocks_of(candidates, 32_768), 0)
        spent = {}
        for name, call in calls.items():
            spent[name] = report.seconds(call, 3)
            report.say(f"{count} x {pool} x {dims}: {name}", f"{1e3 * spent[name]:.2f} ms")
        if "faiss.knn_gpu" in spent and dims == 3072:
            ratio = spent["faiss.knn_gpu"] / spent["this search"]
            report.say(
                "times as fast as faiss.knn_gpu",
                f"{ratio:.1f}",
                "at least 5",
                ratio >= 5,
            )


def peers(queries: Tensor, candidates: Tensor) -> dict[str, Callable[[], Any]]:
    """What one would write instead, and the product alone."""
    halves = queries.bfloat16()
    columns = candidates.bfloat16().T

    def cdist() -> None:
        for part in queries.split(2048):
            torch.cdist(part, candidates).argmin(1)

    def product() -> None:
        for part in halves.split(4096):
            part @ columns

    calls: dict[str, Callable[[], Any]] = {
        "torch.cdist and argmin": cdist,
        "the product alone in bfloat16": product,
    }
    faiss = load_faiss()
    if queries.is_cuda and hasattr(faiss, "StandardGpuResources"):  # a GPU build
        calls["faiss.knn_gpu"] = partial(
            faiss.knn_gpu,
            faiss.StandardGpuResources(),
            queries,
            candidates,
            1,
        )
    return calls


def parts() -> dict[str, Callable[[Report], None]]:
    """What each part does, by name."""
    import gpu_runs

    found = {}
    for name in get_args(Part):
        found[name] = getattr(gpu_runs, name, None)
    return found | {"random": random, "search": searches, "index": index, "groups": groups, "match": match}


def main(settings: Settings) -> int:
    if settings.to:
        check_place(settings.to)
    if settings.minutes <= 0:
        raise InputError(f"--minutes={settings.minutes:g}: give more than 0")
    if not settings.parts:
        raise InputError(f"--parts: give some of {', '.join(get_args(Part))}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device that torch can use (`naign doctor` says more): try --device cpu --small")
    if "train" in settings.parts and not settings.small:
        pack_cifar10(settings.data)
    if settings.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)  # others on the machine would have several wait for one another
        name = "a CPU, one thread"
    else:
        repeat_bits()
        name = torch.cuda.get_device_name()
    to = settings.to or ROOT / f"benchmarks/results/gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}"
    with tempfile.TemporaryDirectory() as scratch:
        report = Report(settings, Path(scratch))
        for part in settings.parts:
            begin = time.monotonic()
            report.part = part
            do(parts()[part], report)
            print(f"{part:12} {time.monotonic() - begin:.1f} s", flush=True)
            report.write(to, f"{name}, torch {torch.__version__}")
    return 0 if all(line["holds"] for line in report.lines) else 1


def pack_cifar10(path: Path) -> None:
    if (path / "index.json").exists():
        return
    command = [sys.executable, "-m", "naign.cli", "pack", "cifar10", "--to", str(path)]
    done = subprocess.run(command, env=environment(), check=False)
    if done.returncode:
        raise InputError("CIFAR-10, for the part `train`, cannot be packed: see above, or name other --parts")


def do(part: Callable[[Report], None], report: Report) -> None:
    """Run a part; a failure is a line, since the other parts may tell more."""
    if report.left() < 0:
        report.say("not begun", f"{report.settings.minutes:g} minutes are over", "to end", False)
        return
    try:
        part(report)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        report.say("failed", reason, "to end", False)


if __name__ == "__main__":
    with exit_on_input_error("gpu"):
        sys.exit(main(tyro.cli(Settings)))
