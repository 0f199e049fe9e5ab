"""Parts of gpu.py that run the program: they read what it reports, and no code of the training loop."""

import gzip
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from budget import SHAPES
from output import ROOT, Record
from safetensors.torch import load_file
from torch import Tensor, nn
from trained import environment

from naign.config import load
from naign.data.format.writer import pack
from naign.data.sources.source import Example, Made, Source
from naign.model.networks import build_network

if TYPE_CHECKING:
    from gpu import Report

TRAIN = (sys.executable, str(ROOT / "pipeline/train.py"), "--report.pictures=0")
NAIGN = (sys.executable, "-m", "naign.cli")
LATENTS = ("--latents.name=gaussian",)
"""Latents without a prior that learns."""
ROUND = 512
STEPS = ROUND // 32
"""Of a round."""
DIGITS = (
    "--config=digits",
    "--data.path=digits",
    f"--match.round={ROUND}",
    "--match.block=64",
    "--train.batch=32",
    "--train.passes=1",
    "--model.width=8",
    "--model.code=16",
    f"--train.images={4 * ROUND}",
)
RECIPES = ("mnist", "cifar10", "folder64", "folder256")
TRIAL = 8
"""Rounds of the trial that says how long one takes."""
MEASURING = 90.0
"""Seconds that are kept for measuring what was trained."""
FULL = """
import runpy, sys, torch
torch.cuda.set_per_process_memory_fraction(0.02)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call(report: "Report", *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the scratch folder."""
    env = environment()
    if not report.on_gpu:
        env["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(
        command,
        cwd=report.scratch,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def must(done: "subprocess.CompletedProcess[str]") -> str:
    """The output of a command that must succeed."""
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1])
    return done.stdout


def digits(report: "Report") -> None:
    """Pack the digits, once."""
    if not (report.scratch / "digits").exists():
        must(
            call(
                report,
                *NAIGN,
                "pack",
                "digits",
                "--to=digits",
            )
        )


def reported(report: "Report", run: str) -> list[Record]:
    """The metrics of each round."""
    file = report.scratch / run / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained(report: "Report", run: str, *options: str) -> list[Record]:
    """The metrics of a run of the digits, which is trained once."""
    digits(report)
    if not (report.scratch / run).exists():
        must(call(report, *TRAIN, *DIGITS, f"--run.path={run}", *options))
    return reported(report, run)


def weights(report: "Report", run: str) -> dict[str, Tensor]:
    """The weights at a run's end."""
    newest = max((report.scratch / run / "checkpoints").glob("step-*"))
    return load_file(newest / "model.safetensors")


def differing(report: "Report", one: str, other: str) -> int:
    """How many tensors of two runs' weights differ in a bit."""
    ours = weights(report, one)
    theirs = weights(report, other)
    count = 0
    for name, value in ours.items():
        if not torch.equal(value, theirs[name]):
            count += 1
    return count


def random_images(report: "Report", name: str, count: int) -> str:
    """The path of a data set of so many random images in the shape of a recipe."""
    shape = SHAPES[name]

    def make(number: int) -> Example:
        draws = np.random.Generator(np.random.Philox(key=0, counter=number))
        pixels = draws.integers(0, 256, shape, dtype=np.uint8)
        return f"image-{number:06d}", pixels, -1

    source = Source(
        name="random",
        kind="image",
        shape=shape,
        labels=(),
        splits={
            "train": Made(length=count, make=make),
            "test": Made(length=4, make=make),
        },
    )
    folder = report.scratch / f"images-{name}-{count}"
    if not folder.exists():
        pack(source, str(folder), shards=4)
    return str(folder)


def recipe(
    report: "Report",
    name: str,
    steps: int,
    *options: str,
    begin: Sequence[str] = TRAIN[:2],
    run: str = "",
) -> list[Record]:
    """The metrics of three rounds of a recipe, of so many steps each, on random images."""
    batch = 8
    if not report.small:
        batch = load(str(ROOT / f"configs/{name}.yaml")).train.batch
    size = batch * steps
    run = run or f"{name}-{steps}"
    command = [*begin, *TRAIN[2:], f"--config={name}", *LATENTS, f"--run.path={run}", *options]
    command += [f"--data.path={random_images(report, name, size)}", f"--match.round={size}", "--match.block=8"]
    command.append("--match.group=0")
    command += [f"--train.batch={batch}", "--train.passes=1", f"--train.images={3 * size}", "--prior.name=none"]
    must(call(report, *command))
    return reported(report, run)


def doctor(report: "Report") -> None:
    done = call(report, *NAIGN, "doctor")
    for line in done.stdout.splitlines():
        report.say(line.strip(), "")
    report.say("exit code of `naign doctor`", done.returncode, "0", done.returncode == 0)


def repeat(report: "Report") -> None:
    trained(report, "whole", "--profile.rounds=1")
    trained(report, "again")
    report.none("tensors that differ in a bit", differing(report, "whole", "again"))


def resume(report: "Report") -> None:
    trained(report, "whole", "--profile.rounds=1")
    command = [*TRAIN, *DIGITS, "--run.path=stopped"]
    env = environment()
    if not report.on_gpu:
        env["ACCELERATE_USE_CPU"] = "true"
    process = subprocess.Popen(
        command,
        cwd=report.scratch,
        env=env,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not reported(report, "stopped"):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.wait()
    report.say("exit code of the run that was stopped", process.returncode, "75", process.returncode == 75)
    must(call(report, *command))
    report.none("tensors that are not those of the run that went through", differing(report, "whole", "stopped"))


def zero(report: "Report") -> None:
    steps = 2 if report.small else 16
    engines = {}
    for engine in ("gpus" if report.on_gpu else "single", "zero2"):
        narrow = ("--model.width=8", "--model.depth=1") if report.small else ()
        begin = (*NAIGN, "launch", "--processes=1", f"--engine={engine}")
        rounds = recipe(
            report,
            "folder64",
            steps,
            "--train.precision=auto",
            *narrow,
            begin=begin,
            run=f"folder64-{engine}",
        )
        engines[engine] = rounds[-1]
        speed = rounds[-1]["speed/images_per_second"]
        report.say(f"folder64, {engine}", f"{rounds[-1]['memory/peak_gb']:.2f} GB, {speed:.0f} images/s")
    losses = [line["loss/total"] for line in engines.values()]
    apart = abs(losses[1] / losses[0] - 1)
    report.say(
        "losses of both, relative difference",
        f"{apart:.3f}",
        "at most 0.02",
        apart <= 0.02,
    )


def trace(report: "Report") -> None:
    trained(report, "whole", "--profile.rounds=1")
    (file,) = (report.scratch / "whole/profile").iterdir()
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    (fit,) = [event for event in marks if event["name"] == "fit"]
    end = fit["ts"] + fit["dur"]
    kernels = 0
    copies = 0
    for event in events:
        if not fit["ts"] <= event.get("ts", 0) <= end:
            continue
        kind = event.get("cat")
        if kind == "kernel":
            kernels += 1
        if kind == "gpu_memcpy" and "DtoD" not in event["name"]:
            copies += 1
    report.say("kernels that a step launches", round(kernels / STEPS))
    report.say(
        "copies between host and device while fitting a round",
        copies,
        "at most 4",
        copies <= 4,
    )


def flat(values: dict[str, Tensor]) -> Tensor:
    """All values of a model."""
    return torch.cat([value.flatten() for value in values.values()])


def compiled(report: "Report") -> None:
    if not report.on_gpu:
        report.say("train.compile", "no GPU")
        return
    plain = trained(report, "whole", "--profile.rounds=1")
    fast = trained(report, "compiled", "--train.compile")
    ours = flat(weights(report, "whole"))
    theirs = flat(weights(report, "compiled"))
    difference = ours - theirs
    error = float(difference.norm() / ours.norm())
    report.say(
        "weights, compiled and not, relative difference",
        f"{error:.1e}",
        "below 1e-2",
        error < 1e-2,
    )
    ratio = fast[-1]["speed/images_per_second"] / plain[-1]["speed/images_per_second"]
    report.say("times as fast, compiled", f"{ratio:.2f}")


def memory(report: "Report") -> None:
    computed = json.loads((ROOT / "benchmarks/results/budget.json").read_text())
    for name in RECIPES:
        expected = computed[name]["gigabytes"]
        if not report.on_gpu:
            report.say(f"{name}: GB of a step, computed", f"{sum(expected[:3]):.2f}")
            continue
        peak = recipe(report, name, 2)[-1]["memory/peak_gb"]
        most = 1.3 * sum(expected[:3]) + 0.3
        report.say(f"{name}: GB of a step", f"{peak:.2f}", f"at most {most:.2f}", peak <= most)


def full(report: "Report") -> None:
    if not report.on_gpu:
        report.say("memory is full", "no GPU")
        return
    digits(report)
    sizes = ["--run.path=full", "--match.round=1024", "--train.batch=1024", "--model.width=512"]
    python = [sys.executable, "-c", FULL]
    done = call(
        report,
        *python,
        *TRAIN[1:],
        *DIGITS,
        *sizes,
    )
    lines = [line for line in done.stderr.splitlines() if "memory is full" in line]
    told = "".join(lines)[:160]
    report.say("exit code where the memory is full", done.returncode, "2", done.returncode == 2)
    report.say("what it says then", told, "a line", len(lines) == 1)


def step(report: "Report") -> None:
    steps = 4 if report.small else 64
    alone = ("--objective.damage=noise", "--objective.imle=0", "--objective.third=none", "--train.optimizer=adamw")
    for name in ("mnist",) if report.small else ("mnist", "cifar10"):
        rounds = recipe(report, name, steps, *alone)
        seconds = []
        for line in rounds[1:]:
            batch = line["images_seen"] / line["step"]
            seconds.append(line["share/fit"] * batch / line["speed/images_per_second"])
        ours = statistics.median(seconds)
        bare = bare_step(report, name, int(batch))
        report.say(f"{name}: a step of {batch:.0f}", f"{1e3 * ours:.2f} ms")
        holds = report.small or ours <= 1.1 * bare
        report.say(f"{name}: times a bare loop", f"{ours / bare:.3f}", "at most 1.1", holds)


def bare_step(report: "Report", name: str, batch: int) -> float:
    """Seconds of a step of the same network, losses and optimizer, and nothing else."""
    config = load(str(ROOT / f"configs/{name}.yaml"))
    network = build_network(config.model, SHAPES[name])
    network.to(report.device)
    adam = torch.optim.AdamW(network.parameters(), fused=report.on_gpu)
    images = torch.rand(batch, *SHAPES[name], device=report.device)
    images = images * 2 - 1
    autocast = torch.autocast(
        report.device.type,
        dtype=torch.bfloat16,
        enabled=report.on_gpu,
    )
    clean = config.objective.reconstruction > 0

    def once() -> None:
        damaged = images + 0.5 * torch.randn_like(images)
        inputs = damaged
        targets = images
        if clean:
            inputs = torch.cat([images, damaged])
            targets = torch.cat([images, images])
        with autocast:
            made = network(inputs).float()
        (made - targets).abs().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return report.seconds(once, 5 if report.small else 100)


def train(report: "Report") -> None:
    """cifar10.yaml in the time that is left; the digits if `small`."""
    if report.small:
        trained(report, "whole", "--profile.rounds=1")
        measure(report, "whole", "--samples=500")
        return
    given = ["--config=cifar10", f"--data.path={report.settings.data.absolute()}"]
    config = load(str(ROOT / "configs/cifar10.yaml"))
    size = config.match.round
    must(call(report, *TRAIN, *given, "--run.path=trial", f"--train.images={TRIAL * size}"))
    a_round = reported(report, "trial")[-1]["seconds/training"] / TRIAL
    most = int(0.9 * (report.left() - MEASURING) / a_round)
    rounds = max(TRIAL, min(config.train.images // size, most))
    report.say(f"rounds of {size} images, seconds of one", f"{rounds}, {a_round:.2f}")
    must(call(report, *TRAIN, *given, "--run.path=run", f"--train.images={rounds * size}"))
    measure(report, "run")


def measure(report: "Report", run: str, *options: str) -> None:
    must(
        call(
            report,
            *NAIGN,
            "evaluate",
            run,
            *options,
        )
    )
    metrics = json.loads((report.scratch / run / "evaluation/metrics.json").read_text())
    report.say("images learned from", f"{reported(report, run)[-1]['images_seen']:,}")
    report.say(f"Frechet distance on {metrics['encoder']} of f(z)", f"{metrics['fd']['once']:.3g}")
    for kind, errors in (metrics["restoration"] or {}).items():
        report.say(f"{kind}, error before and after", f"{errors['input']:.3f}, {errors['once']:.3f}")
