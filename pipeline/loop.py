"""The rounds: take, match, fit, report, checkpoint.

Progress is counted in images seen. Everything random is a function of (seed, round, number), so a run that resumes at
a round's start goes on exactly as if it had never stopped.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.config import Config, TrainConfig, to_dict
from pipeline.data.samples import scaled
from pipeline.data.stream import Stream, Taken
from pipeline.errors import InputError
from pipeline.evaluate.encoder import load_encoder
from pipeline.match import latents
from pipeline.match.matcher import Match, match_round
from pipeline.match.space import SpaceConfig, check_space
from pipeline.model.networks import build_network
from pipeline.model.objectives import losses
from pipeline.run import Learned, Position, claim, restore, save
from pipeline.runtime.checkpoint import newest_checkpoint
from pipeline.runtime.distributed import together, total
from pipeline.runtime.monitor import Monitor
from pipeline.runtime.progress import draw_progress
from pipeline.runtime.signals import StopRequest


def train(config: Config, accelerator: Accelerator) -> bool:
    """Train until the budget is spent; False if a signal ended it earlier, after a checkpoint. Collective."""
    # Setup: everything that can be refused is refused here, on every rank, before anything is written.
    rank, world = accelerator.process_index, accelerator.num_processes
    stop = StopRequest()
    with together(accelerator):
        stream = open_stream(config, rank, world)
        torch.manual_seed(config.seed)  # the first weights, the same on every rank
        bare = build_network(config.model, stream.shape).to(accelerator.device)
        latents.check_law(config.match.latents, stream.shape)
        features = open_features(config.match.space, stream.shape, accelerator.device)
    with together(accelerator):
        newest, lock = claim(config) if rank == 0 else (None, None)
    newest = newest if rank == 0 else newest_checkpoint(Path(config.run.path) / "checkpoints")

    # Resume.
    learned, network = build_learner(config, bare, accelerator)
    with together(accelerator):
        position = restore(newest, learned) if newest else Position()
    trained = config.match.round * config.train.passes  # images a round
    rounds = -(-config.train.images // trained)

    monitor = Monitor(
        Path(config.run.path),
        active=rank == 0,
        images=rounds * trained,
        images_seen=position.images_seen,
        config=yaml.safe_dump(to_dict(config), sort_keys=False),
    )
    described = ""
    with stream, monitor:
        if position.round >= rounds:
            monitor.say(f"nothing left to do: {config.run.path} has seen its {position.images_seen} images")
        else:
            monitor.say(headline(config, bare, stream, accelerator, rounds, newest))
        for round in range(position.round, rounds):
            clock = [time.perf_counter()]

            # Take: this rank's share of the round's images.
            with together(accelerator):
                taken = stream.take(round)
                images = scaled(taken.images.to(accelerator.device))
            if config.match.latents == "fourier" and learned.spectrum is None:
                learned.spectrum = latents.measure_spectrum(images, lambda mean: accelerator.reduce(mean, "mean"))
            clock.append(time.perf_counter())

            # Match: the latent whose sample is nearest to each image, out of the whole pool.
            draw = Drawing(config, round, stream.shape, accelerator.device, learned.spectrum)
            match = find_match(config, bare, draw, images, features) if config.objective.needs_match else None
            if match and match.described != described:
                described = match.described
                monitor.say(described)
            clock.append(time.perf_counter())

            # Fit: a few passes of SGD on (image, its latent).
            values = fit(
                config, network, learned, draw, images, match, position, rounds * trained, accelerator, monitor
            )
            clock.append(time.perf_counter())
            position.round, position.seconds = round + 1, position.seconds + clock[-1] - clock[0]

            # Report.
            if not math.isfinite(values["loss/total"]):
                raise FloatingPointError(
                    f"the loss of round {round} is {values['loss/total']}; the newest checkpoint is "
                    f"{newest_checkpoint(Path(config.run.path) / 'checkpoints')}; a lower train.lr may help"
                )
            last = round + 1 == rounds
            if match:
                values |= match.values
            if last or (round + 1) % config.report.rounds == 0:
                values |= speed_values(clock, trained) | {"seconds/training": position.seconds}
                values |= data_values(taken, stream, round, accelerator)
                monitor.scalars(values, position.images_seen, round=round, step=position.step)
                if match:
                    monitor.histogram("match/distance", match.distances, position.images_seen)
            wanted = config.report.pictures and (last or round == 0 or (round + 1) % config.report.pictures == 0)
            if wanted and rank == 0:
                shown = replace(draw, round=rounds).latents(torch.arange(64))  # of no round: the same all along
                for name, picture in draw_progress(bare, shown, images).items():
                    monitor.picture(name, picture, position.images_seen)

            # Checkpoint, and stop if any rank was asked to.
            stopping = not last and total([float(stop.requested)], accelerator)[0] > 0
            if last or stopping or (round + 1) % config.checkpoint.rounds == 0:
                if rank == 0:
                    save(config, stream, learned, position, world=world)
                accelerator.wait_for_everyone()
            if stopping:
                monitor.say(
                    f"stopped on request after round {round + 1} of {rounds}; the same command goes on from here"
                )
                break
    if lock:
        lock.release()
    return position.round >= rounds


@dataclass(slots=True)
class Drawing:
    """The random numbers of one round, by number."""

    config: Config
    round: int
    shape: tuple[int, ...]
    device: torch.device
    spectrum: Tensor | None

    def latents(self, ids: Tensor) -> Tensor:
        """Latents (len(ids), *shape) by the configured law."""
        law, seed = self.config.match.latents, self.config.seed
        return latents.draw(law, seed, self.round, ids, self.shape, self.device, spectrum=self.spectrum)

    def noise(self, ids: Tensor) -> Tensor:
        """Standard normals (len(ids), *shape), independent of the latents."""
        return latents.normal(self.config.seed, self.round, ids, self.shape, self.device, stream=latents.NOISE)

    def jittered(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """The latents of matched ids with match.jitter's noise, which is that of the images' numbers."""
        drawn = self.latents(ids)
        if not self.config.match.jitter:
            return drawn
        noise = latents.normal(self.config.seed, self.round, numbers, self.shape, self.device, stream=latents.JITTER)
        return drawn + self.config.match.jitter * noise


def open_stream(config: Config, rank: int, world: int) -> Stream:
    """This rank's stream; InputError where the data, the world and the batch do not go together."""
    if config.train.batch % world:
        raise InputError(
            f"train.batch={config.train.batch} images cannot be shared evenly by {world} ranks: "
            f"--train.batch={-(-config.train.batch // world) * world} can"
        )
    return Stream(config.data, seed=config.seed, round_size=config.match.round, rank=rank, world=world)


def build_learner(config: Config, bare: nn.Module, accelerator: Accelerator) -> tuple[Learned, nn.Module]:
    """What training changes, and the network as the engine wraps it."""
    train = config.train
    adam = torch.optim.AdamW(
        bare.parameters(), lr=train.lr, betas=(train.beta1, train.beta2), weight_decay=train.weight_decay
    )
    network, optimizer = accelerator.prepare(bare, adam)
    ema = AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(train.ema)) if train.ema else None
    return Learned(network=bare, optimizer=optimizer, ema=ema), network


def open_features(
    space: SpaceConfig, shape: tuple[int, ...], device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """The encoder of the match's space, if it has one; InputError where space and data do not go together."""
    check_space(space, shape)
    if not space.features:
        return None
    encoder = load_encoder(space.encoder)
    if encoder.shape not in (None, shape):
        raise InputError(f"match.space.encoder '{space.encoder}' reads {encoder.shape}, these images are {shape}")
    if encoder.network:
        encoder.network.to(device)
    return encoder.features


def find_match(
    config: Config, bare: nn.Module, draw: Drawing, images: Tensor, features: Callable[[Tensor], Tensor] | None
) -> Match:
    """Collective: the match of this rank's images in the pool of all ranks."""

    @torch.inference_mode()
    def sample(ids: Tensor) -> Tensor:
        made: Tensor = bare(draw.latents(ids))
        return made

    return match_round(images, sample, config.match, features)


def fit(
    config: Config,
    network: nn.Module,
    learned: Learned,
    draw: Drawing,
    images: Tensor,  # (n, *shape): this rank's, of the round
    match: Match | None,  # None: fresh latents
    position: Position,  # moved on
    budget: int,  # images, where the learning rate ends
    accelerator: Accelerator,
    monitor: Monitor,
) -> dict[str, float]:
    """Collective: the passes over one round; the mean of each loss over steps and ranks, and the learning rate."""
    count, rank, optimizer = len(images), accelerator.process_index, learned.optimizer
    sums: dict[str, Tensor] = {}
    steps, lr = 0, 0.0
    for turn in range(config.train.passes):
        for rows in pass_order(count, config.seed, draw.round, turn, rank).split(
            config.train.batch // accelerator.num_processes
        ):
            lr = learning_rate(config.train, position.images_seen, budget)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Numbers that no other image of the round has, in any pass: for fresh latents, fresh noise and jitter.
            fresh = rows + count * (rank + turn * accelerator.num_processes)
            terms = losses(
                config.objective,
                network,
                images[rows],
                draw.jittered(match.ids[rows], fresh) if match else draw.latents(fresh),
                noise=draw.noise(fresh) if config.objective.needs_noise else None,
                frozen=learned.network,
            )
            accelerator.backward(terms["total"])
            if config.train.clip:
                terms["gradient"] = accelerator.clip_grad_norm_(network.parameters(), config.train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if learned.ema:
                learned.ema.update_parameters(learned.network)
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
            steps += 1
            position.step += 1
            position.images_seen += config.train.batch
            monitor.advance(config.train.batch)
    names = sorted(sums)
    means = total([float(sums[name]) / steps / accelerator.num_processes for name in names], accelerator)
    return {f"loss/{name}": mean for name, mean in zip(names, means, strict=True)} | {"train/lr": lr}


def pass_order(count: int, *key: int) -> Tensor:
    """A permutation (count,) that depends on the arguments alone: it sorts raw draws, which NumPy never changes."""
    return torch.from_numpy(np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable"))


def learning_rate(config: TrainConfig, seen: int, budget: int) -> float:
    """Linear warm-up over at most half the budget, then a cosine from lr to lr_end; counted in images."""
    warmup = min(config.warmup, budget // 2)
    if seen < warmup:
        return config.lr * (seen + config.batch) / (warmup + config.batch)
    share = (seen - warmup) / max(1, budget - warmup)
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def speed_values(clock: list[float], images: int) -> dict[str, float]:
    """Images/s of a round and the share of its time in each part, from the times at which they ended."""
    spent = clock[-1] - clock[0]
    parts = zip(("take", "match", "fit"), clock, clock[1:], strict=False)
    return {"speed/images_per_second": images / spent} | {f"share/{n}": (b - a) / spent for n, a, b in parts}


def data_values(taken: Taken, stream: Stream, round: int, accelerator: Accelerator) -> dict[str, float]:
    """Collective: epochs so far, and what reading the round has cost all ranks."""
    tally = taken.tally
    counts = [tally.bytes / 1e6, tally.cached / 1e6, tally.retries, tally.reread / 1e6, len(taken.broken)]
    names = ("megabytes", "cached_megabytes", "retries", "reread_megabytes", "skipped")
    sums = total([float(count) for count in counts], accelerator)
    return {"data/epoch": stream.order.epochs(round + 1)} | {
        f"data/{name}": value for name, value in zip(names, sums, strict=True)
    }


def headline(
    config: Config, bare: nn.Module, stream: Stream, accelerator: Accelerator, rounds: int, newest: Path | None
) -> str:
    """What a run says of itself before the first round."""
    parameters = sum(value.numel() for value in bare.parameters())
    start = f"resuming from {newest}" if newest else "starting anew"
    return (
        f"{stream.manifest.name} {'x'.join(map(str, stream.shape))}, {stream.order.describe()}\n"
        f"{config.objective.name} with "
        f"{parameters / 1e6:.2f} M parameters on {accelerator.num_processes} x {accelerator.device.type}, "
        f"{torch.get_num_threads()} threads\n"
        f"{rounds} rounds of {config.match.round} images x {config.train.passes} passes for {config.train.images}, "
        f"batch {config.train.batch}, pool {config.match.pool}; {start} in {config.run.path}"
    )
