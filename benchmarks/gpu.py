"""The first minutes on a GPU: is it right, does it repeat its bits, and how fast is it.

    python benchmarks/gpu.py                                       # 25 minutes; the page is named after the card
    python benchmarks/gpu.py --device cpu --small --to gpu         # the same on a processor, in some minutes

Each line is printed as soon as it is known; the page (.md) and its numbers (.json) are written after every part.
Exit code 1 where a line is wrong, or a part failed. Not run on a card yet. The parts:

    doctor       the checks of `naign doctor`
    random       draws beside the CPU's, and what one takes
    launches     what a fit step launches, copies and waits for; a step that is skipped
    autocast     the type of GroupNorm's results; decoding threads
    search       every method beside a float64 oracle on the tests' problems, exact distances, the bound's own premise
    determinism  steps of two recipes, twice from the same weights
    resume       a run that is stopped in the middle of a round and goes on, beside one that was not
    compiled     `train.compile` beside without: weights, samples, time
    memory       peaks of fit steps beside benchmarks/results/memory.md
    full         a run where the memory is full
    step         `naign.training.fit` beside a bare loop with the same tricks, and its share of the card's peak
    match        a round's search beside torch.cdist, FAISS and the matrix product alone
    train        cifar10.yaml in the time that is left, and its measures
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import tyro
from gpu_claims import autocast, compiled, doctor, full, launches, memory, train
from gpu_fit import determinism, resume, step
from gpu_report import Part, Report, Settings
from torch import Tensor
from trained import ROOT, check_place

from naign import philox
from naign.data.dataset import DataConfig
from naign.distributed.connect import repeat_bits
from naign.errors import InputError, Unavailable, exit_on_input_error
from naign.match import Blocks, bound, search
from naign.match.distances import exact_distances, faiss_on, load_faiss
from naign.match.method import METHODS
from naign.training.prepare import pack_missing

sys.path.insert(0, str(ROOT))

SIZES = ((2048, 24_576, 784), (12_800, 51_200, 3072))
"""Queries, candidates and values of the searches that are timed."""


def random(report: Report) -> None:
    ids = torch.tensor([0, 1, 2, 5, 2**40 + 3, 2**61 + 7])
    for shape in ((7,), (3, 32, 32)):
        here, there = (philox.uniform(3, 2, ids, shape, device).cpu() for device in ("cpu", report.device))
        wrong = int((here != there).sum())
        report.say(f"uniform numbers {shape} other than the CPU's", str(wrong), "0", wrong == 0)
        here, there = (philox.normal(3, 2, ids, shape, device).cpu() for device in ("cpu", report.device))
        most = float((here - there).abs().max())
        report.say(f"normals {shape}, largest difference from the CPU's", f"{most:.1e}", "below 1e-5", most < 1e-5)
    if report.device.type == "cuda":
        report.say("draws are one Triton kernel", str(philox._one_kernel), "True", philox._one_kernel)
    rows = torch.arange(64 if report.settings.small else 512, device=report.device)
    spent = report.seconds(lambda: philox.normal(0, 0, rows, (3, 64, 64), report.device))
    report.say(f"normals of {len(rows)} x 3 x 64 x 64", f"{1e6 * spent:.0f} us")


def searches(report: Report) -> None:
    from tests.match.problems import CASES, oracle

    device, done, wrong = report.device, 0, list[str]()
    rates = {"bfloat16": (2e-12, 1e-12), "float32": (1e-12, 2e-12)}
    for name, (queries, candidates) in list(CASES.items())[:: 16 if report.settings.small else 1]:
        _, rows = oracle(queries, candidates, 3)
        there = candidates.to(device)
        for kind, rate in rates.items():
            with patch("naign.match.method.measure_rates", lambda device, threads, rate=rate: rate):
                for method in METHODS:
                    for size in (64, 1000):
                        blocks = blocks_of(there, size)
                        found = search(queries.to(device), blocks, 0, method=method, neighbours=3).ids.cpu()
                        done += 1
                        if found[:, : rows.shape[1]].tolist() != rows.tolist():
                            wrong.append(f"{name}, {kind}, {method}")
    report.say(f"wrong answers of {done} searches", f"{len(wrong)} {wrong[:3] or ''}", "0", not wrong)
    for dims in (64, 784, 3072):
        generator, rows = torch.Generator().manual_seed(dims), torch.arange(400, device=device)
        queries, candidates = (torch.randn(400, dims, generator=generator).to(device) for _ in range(2))
        whole = exact_distances(queries, candidates, rows, rows)
        parts = [exact_distances(queries, candidates, rows[:n], rows[:n]) for n in (1, 2, 13, 64)]
        other = sum(int((part != whole[: len(part)]).sum()) for part in parts)
        report.say(f"distances of {dims} values that depend on the pairs beside them", str(other), "0", other == 0)
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        worst = max(premise(width, dtype, device) for width in (64, 792, 3080))
        report.say(f"error of a product in {dtype}, of what the bound allows", f"{worst:.3f}", "at most 1", worst <= 1)


@bound.full_precision()
def premise(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of a product of so many coordinates over gamma_2n times the sum of magnitudes."""
    generator, worst = torch.Generator().manual_seed(width), 0.0
    for kind in ("normal", "one large", "cancel"):
        a, b = (torch.randn(512, width, generator=generator) for _ in range(2))
        if kind == "one large":
            a, b = a.abs() * 2.0**-13, b.abs() * 2.0**-12
            a[:, 0] = b[:, 0] = 1
        if kind == "cancel":
            a[:, width // 2 :], b[:, width // 2 :] = a[:, : width // 2], -b[:, : width // 2]
        a, b = a.to(device, dtype), b.to(device, dtype)
        got = (a @ b.T if dtype == torch.float32 else torch.mm(a, b.T, out_dtype=torch.float32)).double()
        exact, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
        worst = max(worst, float(((got - exact).abs() / (bound.gamma(2 * width) * size)).max()))
    return worst


def blocks_of(rows: Tensor, size: int) -> Blocks:
    return Blocks(rows=len(rows), make=lambda low, high: rows[low:high], size=size)


def match(report: Report) -> None:
    device = report.device
    for count_of, pool, dims in ((128, 1000, 64),) if report.settings.small else SIZES:
        generator = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, generator=generator)
        basis = draw(40, dims)
        queries, candidates = ((draw(n, 40) @ basis + 0.3 * draw(n, dims)).to(device) for n in (count_of, pool))
        what, answers, spent = f"{count_of} x {pool} x {dims}", dict[str, Tensor](), dict[str, float]()
        for method in METHODS:
            search_all = partial(search, queries, blocks_of(candidates, 32_768), 0, method=method)
            spent[method] = report.seconds(search_all, 3)
            answers[method] = search_all().ids.cpu()
        alike = all(torch.equal(answers["auto"], found) for found in answers.values())
        report.say(f"{what}: all methods answer alike", str(alike), "True", alike)
        spent |= peers(report, queries, candidates)
        for name, value in spent.items():
            report.say(f"{what}: {name}", f"{1e3 * value:.2f} ms")
        if "faiss.knn_gpu in float32" in spent and dims == 3072:
            ratio = spent["faiss.knn_gpu in float32"] / spent["auto"]
            report.say(f"{what}: times as fast as faiss.knn_gpu in float32", f"{ratio:.1f}", "at least 5", ratio >= 5)


def peers(report: Report, queries: Tensor, candidates: Tensor) -> dict[str, float]:
    """Seconds of what one would write instead, and of the products alone."""
    a, b = queries.bfloat16(), candidates.bfloat16()
    calls: dict[str, Callable[[], Any]] = {
        "torch.cdist and argmin": lambda: [torch.cdist(part, candidates).argmin(1) for part in queries.split(2048)],
        "the product alone in float32": lambda: [part @ candidates.T for part in queries.split(4096)],
        "the product alone in bfloat16": lambda: [part @ b.T for part in a.split(4096)],
    }
    resources = faiss_on(queries.device)
    report.say("FAISS's index is used (method indexed; else it is rounded)", str(bool(resources)))
    for dtype in (torch.float32, torch.float16) if resources and queries.is_cuda else ():
        knn = partial(load_faiss().knn_gpu, resources, queries.to(dtype), candidates.to(dtype), 1)
        calls[f"faiss.knn_gpu in {dtype}".replace("torch.", "")] = knn
    return {name: report.seconds(call, 3) for name, call in calls.items()}


PARTS: dict[Part, Callable[[Report], None]] = {
    **{"doctor": doctor, "random": random, "launches": launches, "autocast": autocast, "search": searches},
    **{"determinism": determinism, "resume": resume, "compiled": compiled, "memory": memory, "full": full},
    **{"step": step, "match": match, "train": train},
}


def main(settings: Settings) -> int:
    if settings.to:
        check_place(settings.to)
    if settings.minutes <= 0:
        raise InputError(f"--minutes={settings.minutes:g}: give more than 0")
    if not settings.parts:
        raise InputError(f"--parts: give some of {', '.join(PARTS)}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device that torch can use (`naign doctor` says more): try --device cpu --small")
    report = Report(settings)
    if settings.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)  # others on the machine would have several wait for one another
    else:
        repeat_bits()
    name = torch.cuda.get_device_name() if settings.device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    card = f"{name}, torch {torch.__version__}"
    to = settings.to or ROOT / f"benchmarks/results/gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}"
    if "train" in settings.parts and not settings.small:
        try:  # before all else: it is read in the end
            pack_missing(DataConfig(path=str(settings.data), source="cifar10"), [])
        except (InputError, Unavailable) as error:
            raise InputError(f"CIFAR-10 is for the part `train`: {error}; or name other --parts") from None
    for part in settings.parts:
        report.part, begin = part, time.monotonic()
        try:
            if report.left() < 0:
                report.say("not begun", f"{settings.minutes:g} minutes are over", "to end", False)
            else:
                PARTS[part](report)
        except (Exception, SystemExit) as error:  # the others may tell more
            traceback.print_exc()
            report.say("failed", f"{type(error).__name__}: {error}".splitlines()[0], "to end", False)
        print(f"{part:12} {time.monotonic() - begin:.1f} s", flush=True)
        report.write(to, card)
    return 0 if all(line["holds"] for line in report.lines) else 1


if __name__ == "__main__":
    with exit_on_input_error("gpu"):
        sys.exit(main(tyro.cli(Settings)))
