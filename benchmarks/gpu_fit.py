"""What gpu.py does with the fit: does it repeat its bits, does a run go on bit for bit, how fast is a step."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from budget import count
from gpu_report import Report
from safetensors.torch import load_file
from step_processes import first_network, opened, random_images
from torch import nn
from trained import ROOT

from naign.checkpoint.writer import newest_checkpoint
from naign.config import Config, parse
from naign.match.matcher import Match
from naign.model.losses import Batch, choose_distance, compute_losses
from naign.model.scale import scaled
from naign.observe.speed import peak_flops
from naign.training.fit import fit, learning_rate, steps_of
from naign.training.round import RoundRandom, RoundState

RECIPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
SHAPES = RECIPES | {"folder64": (3, 64, 64), "folder256": (3, 256, 256)}
RUNS = "whole", "stopped"


class Rounds:
    """Rounds of a recipe on random images, fitted by the program and by a bare loop."""

    def __init__(self, shape: tuple[int, ...], run: Any, config: Config) -> None:
        self.run, self.config, device = run, config, run.accelerator.device
        self.images = scaled(run.stream.take(0).images).to(device)
        self.random = RoundRandom(config, 0, shape, device, run.prior)
        self.match = Match(ids=torch.arange(len(self.images)), distances=torch.zeros(len(self.images)))
        self.seen = range(0, config.match.round, config.train.batch)
        self.rows = steps_of(config, 0, rank=0, world=1, world_size_at_start=1)[: len(self.seen)].to(device)
        self.ids = self.match.ids.to(device)

    def ours(self) -> None:
        self.run.position.done = 0
        state = RoundState(number=0, world_size_at_start=1, random=self.random, images=self.images, first=0)
        state.match = self.match if self.config.objective.needs_match else None
        fit(self.run, state)

    def bare(self, network: nn.Module, adam: torch.optim.Optimizer) -> None:
        """The same mathematics, with the same random numbers, clipping and fused AdamW, and nothing else."""
        config, objective = self.config, self.config.objective
        for rows, seen in zip(self.rows, self.seen, strict=True):
            adam.param_groups[0]["lr"] = learning_rate(config.train, seen, config.train.images)
            images = self.images[rows]
            batch = Batch(
                images=images,
                latents=self.random.latents(self.ids[rows]) if objective.needs_latents else None,
                damaged=self.random.damaged(images, rows) if objective.needs_damaged else None,
                distance=choose_distance(objective, None),
                frozen=network,
                normals=lambda step, rows=rows: self.random.normals(rows, step),  # type: ignore[misc]
            )
            with self.run.accelerator.autocast():
                forward = lambda x: network(x).float()  # noqa: E731
                total = compute_losses(objective, forward, batch)["total"]
            total.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.train.clip or torch.inf)
            adam.step()
            adam.zero_grad()


def on_rounds(report: Report, name: str, use: Callable[[Rounds, Callable[[], Any]], None], steps: int) -> None:
    """Use rounds of so many steps of a recipe, and a function that opens a run with its first weights."""
    shape, batch = SHAPES[name], 8 if report.settings.small else 0
    options = ["--config", str(ROOT / f"configs/{name}.yaml"), "--prior.name=gaussian"]
    options += [f"--train.batch={batch}"] * bool(batch)
    config = parse(options)
    size = config.train.batch * steps
    with tempfile.TemporaryDirectory() as scratch:
        path = random_images(Path(scratch) / "images", shape, size)
        options += [f"--data.path={path}", f"--match.round={size}", f"--match.block={min(size, 512)}"]
        config = parse([*options, f"--run.path={scratch}/run", "--train.images=1000000", "--train.ema=0"])
        with redirect_stderr(StringIO()), opened(config, precision="auto") as start:
            device = report.device

            def fresh() -> Any:
                return start(first_network(config, shape).to(device))

            use(Rounds(shape, fresh(), config), fresh)


def determinism(report: Report) -> None:
    for name in RECIPES:

        def twice(rounds: Rounds, fresh: Callable[[], Any], name: str = name) -> None:
            ends = []
            for _ in range(2):
                rounds.run = fresh()
                rounds.ours()
                ends.append([value.detach().clone() for value in rounds.run.engine.bare.parameters()])
            other = sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
            report.say(f"{name}: weights that differ after {len(rounds.rows)} steps", str(other), "0", other == 0)

        on_rounds(report, name, twice, 2 if report.settings.small else 10)


def resume(report: Report) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        images = 2048 if report.settings.small else 8192
        options = ["--data.path=digits", "--match.round=512", "--match.block=64", "--train.batch=32", "--match.ratio=2"]
        options += [f"--train.images={images}", "--model.width=8", "--model.code=16", "--prior.name=smooth"]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "OMP_NUM_THREADS": "1"}
        env |= {"ACCELERATE_USE_CPU": "true"} if report.device.type == "cpu" else {}
        call = partial(subprocess.run, cwd=scratch, env=env, capture_output=True, text=True, check=True)
        call([sys.executable, "-m", "naign.cli", "pack", "digits", "--to=digits"])
        command = [sys.executable, str(ROOT / "pipeline/train.py"), *options]
        folder = Path(scratch)
        call([*command, "--run.path=whole"])
        process = subprocess.Popen(
            [*command, "--run.path=stopped"], cwd=scratch, env=env, stderr=subprocess.PIPE, text=True
        )
        metrics, deadline = folder / "stopped/metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n")):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        report.say("exit code of the run that was stopped", str(process.returncode), "75", process.returncode == 75)
        call([*command, "--run.path=stopped"])
        whole, gone_on = (
            load_file(f"{newest_checkpoint(folder / name / 'checkpoints')}/model.safetensors") for name in RUNS
        )
        other = sum(not torch.equal(value, gone_on[name]) for name, value in whole.items())
        report.say("weights that are not those of the run that went through", str(other), "0", other == 0)


def step(report: Report) -> None:
    for name, shape in RECIPES.items():

        def both(rounds: Rounds, fresh: Callable[[], Any], name: str = name, shape: tuple[int, ...] = shape) -> None:
            config, count_of = rounds.config, len(rounds.rows)
            network = first_network(config, shape).to(report.device)
            fused = {"fused": True} if report.device.type == "cuda" else {}
            betas = config.train.beta1, config.train.beta2
            decay = config.train.weight_decay
            adam = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=betas, weight_decay=decay, **fused)
            repeats = 2 if report.settings.small else 8
            bare = report.seconds(lambda: rounds.bare(network, adam), repeats) / count_of
            ours = report.seconds(rounds.ours, repeats) / count_of
            batch = config.train.batch
            report.say(f"{name}: a step of {batch}", f"{1e3 * ours:.2f} ms, {batch / ours:,.0f} images/s")
            holds = report.settings.small or ours <= 1.05 * bare
            report.say(f"{name}: times the bare loop", f"{ours / bare:.3f}", "at most 1.05", holds)
            with torch.device("meta"):
                meta = first_network(config, shape)
                flops = 3 * config.objective.forwards * count(meta, torch.empty(1, *shape)) * batch
            if peak := peak_flops(report.device, torch.bfloat16):
                must = ("at least 0.25", flops / ours / peak >= 0.25) if name == "cifar10" else ("", True)
                report.say(f"{name}: share of the peak in bf16", f"{flops / ours / peak:.3f}", *must)

        on_rounds(report, name, both, 4 if report.settings.small else 16)
