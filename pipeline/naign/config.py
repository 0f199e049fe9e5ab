"""The configuration of a run: defaults of dataclasses, then a YAML file, then `--section.key=value`; the last one wins.

Without any of these a run trains the recipe of configs/mnist.yaml on MNIST, which it packs if it is not there yet.
The settings class of a section in NAMED depends on the name that is chosen.
"""

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tyro

from naign.data.dataset import DataConfig, check_config
from naign.errors import InputError, require, shown
from naign.match.matcher import MatchConfig
from naign.model import losses, networks
from naign.model.prior import GmmConfig, PriorConfig, find_prior
from naign.observe.speed import parse_rounds
from naign.observe.trackers import find_trackers
from naign.settings import constraints
from naign.settings.constraints import AT_LEAST_0, FREE, MAY_CHANGE, NOT_EMPTY, POSITIVE, SHARE, between, one_of
from naign.settings.read import MOST, Named, build, leaves, read_yaml
from naign.storage.store import open_store

to_dict = dataclasses.asdict


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    images: int = field(default=630_000, metadata=MAY_CHANGE | POSITIVE)
    """Budget: images trained on, over all ranks and passes; rounded up to whole rounds."""
    batch: int = field(default=128, metadata=POSITIVE)
    """Images per step, over all ranks."""
    passes: int = field(default=1, metadata=POSITIVE)
    """Passes of SGD over a round's images before they are matched anew."""
    optimizer: str = "adamw"
    """adamw, muon or adafactor (docs/training.md says what each does), or one that another package registers."""
    lr: float = field(default=2e-3, metadata=MAY_CHANGE | POSITIVE)
    """Peak learning rate; train.schedule takes it to lr_end."""
    lr_end: float = field(default=1e-5, metadata=MAY_CHANGE | AT_LEAST_0)
    """Learning rate at the end of the budget."""
    schedule: str = field(default="cosine", metadata=MAY_CHANGE | one_of(("cosine", "constant", "wsd")))
    """Learning rate after warm-up: a cosine; constant; or wsd, which is constant for four fifths and then falls as
    1 - sqrt (arXiv 2405.18392)."""
    warmup: int = field(default=10_000, metadata=MAY_CHANGE | AT_LEAST_0)
    """Images over which the learning rate rises from 0; at most half the budget."""
    beta1: float = field(default=0.9, metadata=SHARE)
    """AdamW's decay of the first moment."""
    beta2: float = field(default=0.99, metadata=SHARE)
    """AdamW's decay of the second moment."""
    weight_decay: float = field(default=0.01, metadata=MAY_CHANGE | AT_LEAST_0)
    """Decoupled weight decay."""
    clip: float = field(default=1.0, metadata=MAY_CHANGE | AT_LEAST_0)
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = field(default=0.0, metadata=SHARE)
    """Decay per step of an exponential moving average of the weights, which evaluation uses; 0: none."""
    accumulate: int = field(default=1, metadata=FREE | POSITIVE)
    """Micro-batches per step: batch = micro-batch x accumulate x ranks."""
    precision: str = field(default="auto", metadata=FREE | one_of(("auto", "fp32", "bf16", "fp16")))
    """fp32, bf16 or fp16 for forward and backward; weights are float32. auto: as configured in the launcher; without a
    configuration bf16 if the hardware multiplies it, else fp32."""
    compile: bool = field(default=False, metadata=FREE)
    """Compile the network with torch.compile and, on a GPU, replay its kernels as CUDA graphs, which keep their memory,
    separately for each batch size."""
    channels_last: bool = field(default=False, metadata=FREE)
    """Use the channels-last memory format (NHWC), which convolutions on GPUs prefer."""
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
    (wandb, mlflow, trackio, ...) and of those that other packages bring. docs/tracking.md lists what each receives."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    rounds: int = field(default=25, metadata=POSITIVE)
    """Rounds between checkpoints; one is always written at the end."""
    keep: int = field(default=2, metadata=AT_LEAST_0)
    """How many of the newest complete checkpoints to keep; 0: all."""


@dataclass(kw_only=True, slots=True)
class QualityConfig:
    rounds: int = field(default=0, metadata=AT_LEAST_0)
    """Rounds between measurements of samples and repairs (quality/* of metrics.jsonl and TensorBoard), which also keep
    the checkpoint with the smallest distance: best.json in the run's folder names it; 0: none."""
    samples: int = field(default=2000, metadata=between(10, 10**6))
    """Samples that are compared with as many real examples."""
    encoder: str = ""
    """Encoder whose features quality/fd compares; empty: the one shipped for the data set, else pooled pixels."""
    split: str = field(default="train", metadata=NOT_EMPTY)
    """Split of the real examples. Never choose a checkpoint by the split that you report on."""
    patience: int = field(default=0, metadata=AT_LEAST_0)
    """Stop the run after so many measurements in a row that are no better than the best; 0: never."""


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
    prior: PriorConfig = field(default_factory=GmmConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    report: ReportConfig = field(default_factory=ReportConfig, metadata=FREE)
    quality: QualityConfig = field(default_factory=QualityConfig, metadata=FREE)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    run: RunConfig = field(default_factory=RunConfig, metadata=FREE)
    stop: StopConfig = field(default_factory=StopConfig, metadata=FREE)
    profile: ProfileConfig = field(default_factory=ProfileConfig, metadata=FREE)
    seed: int = field(default=0, metadata=AT_LEAST_0)
    """All random numbers are a function of the seed, the round and the number of an image or latent."""
    resume: str = field(default="auto", metadata=FREE | one_of(("auto", "changed", "never")))
    """auto: continue from the newest complete checkpoint of run.path. changed: the same, and allow another data.path or
    index, train.images, lr, lr_end, schedule, warmup, clip or weight_decay. never: start anew; refuse a used folder."""


NAMED: Named = {
    "model": ("conv", networks.find_network),
    "objective": ("naign", losses.find_objective),
    "prior": ("gmm", find_prior),
}


def parse(arguments: Sequence[str], about: str | None = None) -> Config:
    """The configuration of a command line, with `about` above its --help; InputError or exit code 2 if it is none."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?", const="")
    for section in NAMED:
        first.add_argument(f"--{section}.name", dest=section, nargs="?", const="")
    given, rest = first.parse_known_args(list(arguments))
    content: Any = {} if given.config is None else read_yaml(given.config)
    for section in NAMED:
        name = getattr(given, section)
        if name is not None and isinstance(content, dict) and isinstance(there := content.get(section) or {}, dict):
            content[section] = choose(section, there, name)
            dropped = ", ".join(f"{section}.{key}" for key in there if key not in content[section])
            if dropped and "NAIGN_LAUNCHER" not in os.environ and os.environ.get("RANK", "0") == "0":  # once for all
                print(f"{given.config}: {section}.name={name} does not have {dropped}: left out", file=sys.stderr)
    base = from_dict(content, where=given.config or "the command line")
    config = tyro.cli(Config, args=rest, default=base, prog="naign train", description=about)
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


def flatten(config: Any) -> dict[str, Any]:
    """{'section.key': value} for every setting, also of one section."""
    return {key: value for key, value, _ in leaves(config)}


def changeable(config: Config, metadata: dict[str, Any]) -> set[str]:
    """The keys of the settings with the metadata FREE or MAY_CHANGE, whichever is given."""
    return {key for key, _, change in leaves(config) if change == metadata["change"]}


def differences(old: Config, new: Config) -> list[str]:
    """The settings that affect what is computed and differ, one line each, for a message."""
    before, after = flatten(old), flatten(new)
    same = changeable(new, FREE) | {key for key in before if key not in after or before[key] == after[key]}
    return [f"{key}: {before[key]} there, {after[key]} now" for key in before if key not in same]


def check(config: Config) -> None:
    """Raise InputError for values that no run can have. What depends on data or world size is checked elsewhere."""
    check_config(config.data)
    flat, remote = flatten(config), config.run.remote.rstrip("/")
    for key, value in flat.items():
        if isinstance(value, (int, float)) and not abs(value) < MOST:
            raise InputError(f"{key} is {shown(value)}: it must be a finite number below {MOST:.1e}")
    constraints.check_fields(config, "")
    model, objective, quality = config.model, config.objective, config.quality
    together = model.only_with in ("", objective.name) and objective.only_with in ("", model.name)
    both = f"model.name={model.name} and objective.name={objective.name} do not go together"
    conditional = f"prior.classes with objective.name={objective.name}: the match does not tell classes apart yet"
    unmatched = "set objective.imle=0 and objective.third=none, or leave classes out"
    undamaged = f"objective.name={objective.name} needs damaged images, but its settings lack damage or noise"
    damaged = not objective.needs_damaged or {"objective.damage", "objective.noise"} <= flat.keys()
    never = f"quality.patience is {quality.patience}, but nothing is measured while quality.rounds is 0: set both"
    parse_rounds(config.profile.rounds)
    require(
        (together, f"{both}: choose the same name for both, or another network and objective"),
        (not (config.prior.classes and objective.needs_match), f"{conditional}: {unmatched}"),
        (damaged, f"{undamaged}: declare both in its package, as NaignConfig does"),
        (quality.rounds or not quality.patience, never),
        ("://" not in config.run.path, "run.path is a local folder: for the copy in a bucket there is run.remote"),
    )
    config.run.remote = remote
    if remote:
        open_store(remote)
        for key in ("run.path", "data.path"):
            same = remote == flat[key].rstrip("/")
            require((not same, f"run.remote and {key} are both {remote}: choose another place for the copy"))
    size, batch = config.match.round, config.train.batch
    unfit = f"match.round={size} is no multiple of train.batch={batch}, the images of a step"
    fitting = max(1, round(size / batch)) * batch
    require((size % batch == 0, f"{unfit}: the nearest that fits is --match.round={fitting}"))


def choose(section: str, content: dict[str, Any], name: str) -> dict[str, Any]:
    """The content of a section with another choice: without the settings that the former choice alone has."""
    default, find = NAMED[section]
    former, present = (set(typing.get_type_hints(find(one)[0])) for one in (str(content.get("name", default)), name))
    return {key: value for key, value in content.items() if key not in former - present} | {"name": name}
