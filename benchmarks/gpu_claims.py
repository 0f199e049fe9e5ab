"""Parts of gpu.py: doctor, launches, autocast, compiled, memory, full, train."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_fit import Rounds, on_rounds
from gpu_report import Report
from torch import Tensor
from trained import ROOT

from naign import philox
from naign.config import parse
from naign.model.networks import Norm
from naign.observe.doctor import self_test
from naign.training.prepare import build_model

Fresh = Callable[[], Any]
"""Opens a run of a recipe, with its first weights."""

TRIAL, MEASURING = 8, 90.0
"""Rounds of the trial that says how long one takes; seconds that are kept for measuring what was trained."""

FULL = """
import sys, torch
sys.argv = ["train.py", *sys.argv[1:]]
from pipeline import train
from naign.training import loop
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(0.02)
else:
    def full(*_): raise torch.cuda.OutOfMemoryError("CUDA out of memory, as this processor supposes")
    loop.fit = full
train.main()
"""
"""The training program where the GPU's memory is a fiftieth of what it is; without a GPU, where a fit step runs out."""


def environment(report: Report) -> dict[str, str]:
    """Of a program that the benchmark starts."""
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if report.device.type == "cpu" else {}
    return {**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "OMP_NUM_THREADS": "1", **on_cpu}


def doctor(report: Report) -> None:
    for text, remedy in self_test(report.device):
        report.say(text, remedy or "sound", "sound", not remedy)
    command = [sys.executable, "-m", "naign.cli", "doctor"]
    done = subprocess.run(command, env=environment(report), capture_output=True, text=True, check=False)
    report.say("exit code of `naign doctor`", str(done.returncode), "0", done.returncode == 0)


def launches(report: Report) -> None:
    from tests.training.card import Watch

    def watched(rounds: Rounds, fresh: Fresh) -> None:
        del fresh
        count, network = len(rounds.rows), rounds.run.engine.bare
        rounds.ours()  # compiles kernels
        with Watch(count) as watch:
            rounds.ours()
        report.say("reads of the device within a round, and mixed devices", str(watch.problems[:3]), "[]",
                   not watch.problems)  # fmt: skip
        uploads = sum(watch.uploads.values())
        report.say("copies between host and device, a round", str(uploads), "at most 2", uploads <= 2)
        report.say("launches a step", f"{sum(watch.launches.values()) / count:.0f}")
        report.say("of the time of a round, the GPU works", busy(report, rounds))
        rounds.images[rounds.rows[1]] = math.nan
        rounds.ours()
        finite = all(bool(value.isfinite().all()) for value in network.parameters())
        report.say("steps that are skipped where one has NaN", str(rounds.run.position.skipped), "1",
                   rounds.run.position.skipped == 1 and finite)  # fmt: skip

    on_rounds(report, "mnist", watched, 4)
    if report.device.type == "cuda":
        lines = list[str]()
        with patch.object(philox.log, "warning", lambda text, *rest: lines.append(text % rest)):
            with_triton = draw(report)
            with patch(
                "naign.philox.triton_kernel.drawn", side_effect=RuntimeError("no compiler, as this check supposes")
            ):
                without = draw(report)
        philox._one_kernel = True
        value, must = f"{with_triton}, {without}; {lines}", "at most 4, about 160; a line"
        holds = with_triton <= 4 and 80 <= without <= 240 and len(lines) == 1
        report.say("kernels of a draw with Triton, without; the log", value, must, holds)


def draw(report: Report) -> int:
    """Kernels of a draw of normals."""
    rows = torch.arange(512, device=report.device)
    philox.normal(0, 0, rows, (3, 32, 32), report.device)  # compiles them
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        philox.normal(0, 0, rows, (3, 32, 32), report.device)
        report.wait()
    return sum(event.count for event in kernels_of(trace))


def kernels_of(trace: torch.profiler.profile) -> list[Any]:
    """What ran on the device, not the calls that launched it."""
    return [event for event in trace.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]


def busy(report: Report, rounds: Rounds) -> str:
    """The share of a round in which kernels run."""
    if report.device.type == "cpu":
        return "no GPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        spent = report.seconds(rounds.ours, 1)
    kernels = sum(event.self_device_time_total for event in kernels_of(trace)) / 4e6  # of four rounds
    return f"{kernels / spent:.2f}"


def autocast(report: Report) -> None:
    def watched(rounds: Rounds, fresh: Fresh) -> None:
        del fresh
        kinds = set[str]()
        note = lambda module, given, made: kinds.add(str(made.dtype).removeprefix("torch."))  # noqa: E731
        hooks = [
            part.register_forward_hook(note) for part in rounds.run.engine.bare.modules() if isinstance(part, Norm)
        ]
        rounds.ours()
        for hook in hooks:
            hook.remove()
        must = {"bf16": "bfloat16", "fp16": "float16"}.get(rounds.run.accelerator.mixed_precision, "float32")
        report.say(f"type of GroupNorm's results in {rounds.run.accelerator.mixed_precision}", ", ".join(sorted(kinds)),
                   must, kinds == {must})  # fmt: skip

        config, cuda = rounds.config, report.device.type == "cuda"
        stream, *_ = build_model(config, rounds.run.accelerator, None)
        with stream:
            report.say("threads that decode without data.workers", str(stream._config.workers), "2 on a GPU, else 1",
                       stream._config.workers == 1 + cuda)  # fmt: skip

    on_rounds(report, "cifar10", watched, 2)


def compiled(report: Report) -> None:
    """Rounds with train.compile beside rounds without: the same weights but for rounding, no memory of a graph used."""

    def both(rounds: Rounds, fresh: Fresh) -> None:
        ends, twice, spent = list[list[Tensor]](), list[Tensor](), list[float]()
        for compile in (False, True):
            rounds.config.train.compile = compile
            rounds.run = fresh()
            rounds.ours()
            ends.append([value.detach().clone() for value in rounds.run.engine.bare.parameters()])
            latents = rounds.random.latents(torch.arange(16))
            once = rounds.run.engine.sample(latents)
            kept = once.clone()
            twice += [rounds.run.engine.sample(once), rounds.run.engine.exported("", once)]
            report.say(f"compile={compile}: samples that later ones overwrite", str(int((once != kept).sum())), "0",
                       torch.equal(once, kept))  # fmt: skip
            rounds.ours()
            spent.append(report.seconds(rounds.ours, 1 if report.settings.small else 8) / len(rounds.rows))
        plain, other = (torch.cat([value.flatten() for value in end]) for end in ends)
        error = float((plain - other).norm() / plain.norm())
        report.say(
            "weights after a round, compiled and not, relative difference", f"{error:.1e}", "below 1e-2", error < 1e-2
        )
        apart = max(float((a - b).abs().max()) for a, b in zip(twice[:2], twice[2:], strict=True))
        report.say("samples of samples, compiled and not, largest difference", f"{apart:.1e}", "below 0.2", apart < 0.2)
        report.say("times as fast, compiled", f"{spent[0] / spent[1]:.2f}")
        graphs = rounds.run.engine._graphs
        report.say(
            "CUDA graphs", str(graphs), str(report.device.type == "cuda"), graphs == (report.device.type == "cuda")
        )

    on_rounds(report, "mnist", both, 2 if report.settings.small else 16)


def full(report: Report) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        env = environment(report)
        pack = [sys.executable, "-m", "naign.cli", "pack", "digits", "--to=digits"]
        subprocess.run(pack, cwd=scratch, env=env, capture_output=True, check=True)
        sizes = ["--match.round=1024", "--train.batch=1024"] if report.device.type == "cuda" else ["--match.round=512"]
        width = 512 if report.device.type == "cuda" else 8
        command = [
            sys.executable,
            "-c",
            FULL,
            "--data.path=digits",
            "--run.path=run",
            "--prior.name=gaussian",
            f"--model.width={width}",
            *sizes,
        ]
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
    line = next((line for line in done.stderr.splitlines() if "memory is full" in line), done.stderr[-200:])
    named = "memory is full in round 0, phase" in line and any(word in line for word in ("halve", "double"))
    report.say("exit code where the memory is full", str(done.returncode), "2", done.returncode == 2)
    report.say("what it says then", line[:160], "phase and setting", named)


def memory(report: Report) -> None:
    """The peak of a fit step beside what benchmarks/memory.py has computed, without the average and the images."""
    computed = json.loads((ROOT / "benchmarks/results/memory.json").read_text())
    for name in ("mnist",) if report.settings.small else ("mnist", "cifar10", "folder64", "folder256"):

        def peak(rounds: Rounds, fresh: Fresh, name: str = name) -> None:
            del fresh
            expected = sum(computed[name]["gigabytes"][:2])
            if report.device.type == "cpu":
                report.say(f"{name}: GB of a step, computed", f"{expected:.2f}")
                return
            rounds.ours()
            torch.cuda.reset_peak_memory_stats()
            rounds.ours()
            peaked = (torch.cuda.max_memory_allocated() - rounds.images.nbytes) / 1e9
            report.say(f"{name}: GB of a step", f"{peaked:.2f}", f"{expected:.2f}, 30 % more at most",
                       peaked <= 1.3 * expected + 0.1)  # fmt: skip

        on_rounds(report, name, peak, 2)


def train(report: Report) -> None:
    """Train cifar10.yaml in the time that is left, and measure it; if `small`, digits.yaml with a small flow."""
    name, data, given = "cifar10", str(report.settings.data.absolute()), list[str]()
    if report.settings.small:
        name, data, given = "digits", "digits", ["--prior.name=flow", "--prior.width=16", "--model.width=8"]
    given = ["--config", str(ROOT / f"configs/{name}.yaml"), *given, f"--data.path={data}", "--report.pictures=0"]
    config = parse(given)
    size, env = config.match.round, environment(report)
    with tempfile.TemporaryDirectory() as scratch:
        if report.settings.small:
            pack = [sys.executable, "-m", "naign.cli", "pack", "digits", "--to=digits"]
            subprocess.run(pack, cwd=scratch, env=env, capture_output=True, check=True)

        def run(path: str, rounds: int) -> tuple[int, list[dict[str, float]]]:
            options = [*given, f"--run.path={path}", f"--train.images={rounds * size}"]
            command = [sys.executable, str(ROOT / "pipeline/train.py"), *options]
            process = subprocess.Popen(command, cwd=scratch, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                _, errors = process.communicate(timeout=max(60.0, report.left() - MEASURING))
            except subprocess.TimeoutExpired:
                process.terminate()  # it writes a checkpoint and ends with 75
                _, errors = process.communicate(timeout=120)
            if process.returncode not in (0, 75):
                raise RuntimeError(errors.decode(errors="replace").strip().splitlines()[-1])
            lines = (Path(scratch) / path / "metrics.jsonl").read_text().splitlines()
            return process.returncode, [json.loads(line) for line in lines]

        at = [line["seconds/training"] for line in run("trial", TRIAL)[1]]
        spent = [after - before for before, after in pairwise(at)]  # without the first, which compiles kernels
        fitted, alone = spent[0], min(spent[-2:])
        a_round = fitted * (1 - config.prior.alone) + alone * config.prior.alone
        rounds = max(TRIAL, min(config.train.images // size, int(0.9 * (report.left() - MEASURING) / a_round)))
        rounds = TRIAL if report.settings.small else rounds
        report.say(f"{name}: rounds of {size} images, seconds of one", f"{rounds}, {a_round:.2f}")
        code, lines = run("run", rounds)
        seen = int(lines[-1]["images_seen"] + lines[-1]["codes_seen"])
        report.say(f"{name}: images learned from, exit code", f"{seen:,}, {code}", "to end by itself", code == 0)
        command = [sys.executable, "-m", "naign.cli", "evaluate", "run", "--json"]
        command += ["--samples=500"] * report.settings.small
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        metrics = json.loads(done.stdout)
    report.say(f"{name}: Frechet distance on {metrics['encoder']} of f(z)", f"{metrics['fd']['once']:.3g}")
    for kind, errors in (metrics["restoration"] or {}).items():
        report.say(f"{name}: {kind}, error before and after", f"{errors['input']:.3f}, {errors['once']:.3f}")
