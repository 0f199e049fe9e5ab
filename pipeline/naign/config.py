"""The configuration of a run: defaults of dataclasses, then a YAML file, then `--section.key=value`; the last one wins.

Without any of these a run trains the recipe of configs/mnist.yaml on MNIST, which it packs if it is not there yet.
The settings class of a section in NAMED depends on the name that is chosen. File and command line are validated
together, once, by `check`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tyro

from naign.data.dataset import DataConfig, check_config
from naign.errors import InputError, require, shown
from naign.match.matcher import MatchConfig, check_groups
from naign.model import losses, networks
from naign.model.prior import LatentsConfig, MixtureConfig, PriorConfig, SmoothConfig, find_latents, find_prior
from naign.observe.speed import parse_rounds
from naign.observe.trackers import find_trackers
from naign.settings.constraints import (
    AT_LEAST_0,
    FREE,
    MAY_CHANGE,
    NOT_EMPTY,
    POSITIVE,
    SHARE,
    between,
    check_fields,
    one_of,
)
from naign.settings.read import MOST, Named, build, leaves, read_yaml
from naign.storage.store import open_store

to_dict = dataclasses.asdict


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    images: int = field(default=268_288, metadata=MAY_CHANGE | POSITIVE)
    """Images that f is trained on, over all ranks and passes; rounded up to whole rounds. See also prior.images."""
    batch: int = field(default=128, metadata=POSITIVE)
    """Images per step, over all ranks."""
    passes: int = field(default=1, metadata=between(1, 10**4))
    """Passes of SGD over a round's images before they are matched anew."""
    optimizer: str = "muon"
    """muon, adamw, or one that another package registers."""
    lr: float = field(default=6e-3, metadata=MAY_CHANGE | POSITIVE)
    """Peak learning rate, after a linear warm-up; a cosine takes it to lr_end."""
    lr_end: float = field(default=1e-5, metadata=MAY_CHANGE | AT_LEAST_0)
    """Learning rate at the end of the budget."""
    warmup: int = field(default=10_000, metadata=MAY_CHANGE | AT_LEAST_0)
    """Images over which the learning rate rises from 0; at most half the budget."""
    weight_decay: float = field(default=0.01, metadata=MAY_CHANGE | AT_LEAST_0)
    """Decoupled weight decay."""
    clip: float = field(default=1.0, metadata=MAY_CHANGE | AT_LEAST_0)
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = field(default=0.0, metadata=SHARE)
    """Decay per step of an exponential moving average of the weights, which evaluation uses; 0: none."""
    accumulate: int = field(default=1, metadata=FREE | POSITIVE)
    """Micro-batches per step: batch = micro-batch x accumulate x ranks."""
    precision: str = field(default="auto", metadata=FREE | one_of(("auto", "fp32", "bf16")))
    """fp32 or bf16 for forward and backward; weights are float32. auto: bf16 if the launcher's configuration says
    so or, without DeepSpeed, if the hardware multiplies it; else fp32."""
    compile: bool = field(default=False, metadata=FREE)
    """Compile the network with torch.compile and, on a GPU, replay its kernels as CUDA graphs, which keep their memory,
    separately for each batch size."""
    recompute: bool = field(default=False, metadata=FREE)
    """Activation checkpointing: drop the activations of each block and recompute them in the backward pass."""
    threads: int = field(default=0, metadata=FREE | between(0, 1024))
    """CPU threads per rank. 0: the rank's share of the cores. OMP_NUM_THREADS counts only without a launcher: launchers
    set it to 1, and `naign train` is one."""
    callbacks: str = field(default="", metadata=FREE)
    """Names of callbacks of other packages, as [one, other], which are called after rounds and checkpoints."""
    timeout: int = field(default=600, metadata=FREE | between(1, 10**7))
    """Seconds a rank waits for the others before it fails."""


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    pictures: int = field(default=25, metadata=AT_LEAST_0)
    """Rounds between image grids; 0: none."""
    trackers: str = "tensorboard"
    """Where to report besides metrics.jsonl: names, as [tensorboard, wandb], of TensorBoard, of Accelerate's trackers
    (wandb, mlflow, trackio, ...) and of those that other packages bring."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    rounds: int = field(default=25, metadata=POSITIVE)
    """Rounds between checkpoints; one is always written at the end."""
    keep: int = field(default=2, metadata=AT_LEAST_0)
    """How many of the newest complete checkpoints to keep; 0: all."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    path: str = field(default="runs/mnist", metadata=NOT_EMPTY)
    """Folder of the run: metrics, pictures, checkpoints, evaluation. All ranks must see it, unless `remote` is set."""
    remote: str = ""
    """s3://bucket/prefix, gs:// or az://: the run is copied there, and resumes from it if `path` has nothing newer."""


@dataclass(kw_only=True, slots=True)
class StopConfig:
    within: float = field(default=25.0, metadata=POSITIVE)
    """Seconds from SIGTERM, SIGUSR1, SIGHUP or Ctrl-C until a checkpoint is written and the run exits. torchrun and
    Accelerate kill after 30."""


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    rounds: str = ""
    """Rounds of which every rank writes a trace for ui.perfetto.dev, as 3 or 3-4; empty: none."""


@dataclass(kw_only=True, slots=True)
class Config:
    """Train an idempotent generative network. `--config` reads a YAML first, a file or a name such as digits; options
    given here override it.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: networks.NetworkConfig = field(default_factory=networks.ConvConfig)
    objective: losses.ObjectiveConfig = field(default_factory=losses.NaignConfig)
    latents: LatentsConfig = field(default_factory=SmoothConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prior: PriorConfig = field(default_factory=MixtureConfig)
    report: ReportConfig = field(default_factory=ReportConfig, metadata=FREE)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    run: RunConfig = field(default_factory=RunConfig, metadata=FREE)
    stop: StopConfig = field(default_factory=StopConfig, metadata=FREE)
    profile: ProfileConfig = field(default_factory=ProfileConfig, metadata=FREE)
    seed: int = field(default=0, metadata=AT_LEAST_0)
    """All random numbers are a function of the seed, the round and the number of an image or latent."""
    resume: str = field(default="auto", metadata=FREE | one_of(("auto", "changed")))
    """auto: continue from the newest complete checkpoint of run.path. changed: the same, and allow another data.path or
    index, train.images, lr, lr_end, warmup, clip or weight_decay."""


NAMED: Named = {
    "model": ("conv", networks.find_network),
    "objective": ("naign", losses.find_objective),
    "latents": ("smooth", find_latents),
    "prior": ("gmm", find_prior),
}


def parse(arguments: Sequence[str], about: str | None = None) -> Config:
    """The configuration of a command line, with `about` above its --help. Exits with 2, or raises InputError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?", const="")
    for section in NAMED:
        first.add_argument(f"--{section}.name", dest=section, nargs="?", const="")
    given, rest = first.parse_known_args(list(arguments))
    content: Any = {}
    if given.config is not None:
        content = read_yaml(given.config)
    if isinstance(content, dict):
        for section, (default, _) in NAMED.items():
            name = getattr(given, section)
            there = content.get(section)
            former = there.get("name", default) if isinstance(there, dict) else default
            if name is not None and name != former:
                content[section] = {"name": name}  # its own defaults, whatever the file has for another choice
    base: Config = build(Config, content, given.config or "the command line", named=NAMED)
    try:
        config = tyro.cli(Config, args=rest, default=base, prog="naign train", description=about)
    except SystemExit as ended:
        if ended.code:
            chosen = " ".join(f"--{section}.name={getattr(base, section).name}" for section in NAMED)
            print(f"The options are those of {chosen}; others have their own.", file=sys.stderr)
        raise
    check(config)
    find_trackers(config.report.trackers)  # here, since a run is read where its trackers need not be installed
    return config


def load(path: str) -> Config:
    """The configuration of a YAML file, or of a name in configs/; keys that it does not name keep their defaults."""
    return from_dict(read_yaml(path), where=path)


def from_dict(content: Any, *, where: str) -> Config:
    """The configuration with the keys and values of the file `where`. Raises InputError if it is invalid."""
    config: Config = build(Config, content, where, named=NAMED)
    check(config)
    return config


def count_rounds(config: Config) -> int:
    """Rounds of stage 1."""
    return -(-config.train.images // (config.match.round * config.train.passes))


def flatten(config: Any) -> dict[str, Any]:
    """{'section.key': value} for every setting, also of one section."""
    return {key: value for key, value, _ in leaves(config)}


def changeable(config: Config, metadata: dict[str, Any]) -> set[str]:
    """The keys of the settings with the metadata FREE or MAY_CHANGE, whichever is given."""
    return {key for key, _, change in leaves(config) if change == metadata["change"]}


def differences(old: Config, new: Config) -> list[str]:
    """The settings that affect what is computed and differ, one line each, for a message."""
    after = flatten(new)
    free = changeable(new, FREE)
    lines = []
    for key, value in flatten(old).items():
        if key in after and key not in free and value != after[key]:
            lines.append(f"{key}: {value} there, {after[key]} now")
    return lines


def check(config: Config) -> None:
    """Raise InputError for values that no run can have. What depends on data or world size is checked elsewhere."""
    for key, value in flatten(config).items():
        if isinstance(value, (int, float)) and not abs(value) < MOST:
            raise InputError(f"{key} is {shown(value)}: it must be a finite number below {MOST:.1e}")
    check_config(config.data)
    check_fields(config, "")
    model = config.model
    objective = config.objective
    for section in (model, objective, config.latents, config.prior):
        section.check()
    parse_rounds(config.profile.rounds)
    check_groups(config.match, 1)
    together = model.only_with in ("", objective.name) and objective.only_with in ("", model.name)
    both = f"model.name={model.name} and objective.name={objective.name} do not go together"
    size = config.match.round
    batch = config.train.batch
    fitting = max(1, round(size / batch)) * batch
    unfit = f"match.round={size} is not a multiple of train.batch={batch}, the images of a step"
    require(
        (together, f"{both}: choose the same name for both, or another network and objective"),
        (size % batch == 0, f"{unfit}: the nearest that fits is --match.round={fitting}"),
        (config.run.path != config.data.path, f"run.path and data.path are both {config.run.path}: choose others"),
        ("://" not in config.run.path, "run.path is a local folder: for the copy in a bucket there is run.remote"),
    )
    remote = config.run.remote.rstrip("/")
    config.run.remote = remote
    if not remote:
        return
    open_store(remote)
    for key, place in (("run.path", config.run.path), ("data.path", config.data.path)):
        require((remote != place.rstrip("/"), f"run.remote and {key} are both {remote}: choose another place"))
