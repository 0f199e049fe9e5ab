"""The whole configuration: dataclasses with defaults, then a YAML file, then `--section.key=value`; the last wins."""

import dataclasses
import difflib
import reprlib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
import yaml

from pipeline.data.dataset import DataConfig, check_config
from pipeline.errors import InputError, printable
from pipeline.match.matcher import MatchConfig
from pipeline.model.networks import NetworkConfig
from pipeline.model.objectives import ObjectiveConfig
from pipeline.observe.speed import parse_rounds
from pipeline.storage.store import open_store


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    images: int = 300_000
    """Budget: images trained on, over all ranks and passes; rounded up to whole rounds."""

    batch: int = 128
    """Images a step, over all ranks."""

    passes: int = 1
    """Passes of SGD over a round's images before they are matched anew."""

    lr: float = 2e-3
    """Peak learning rate of AdamW; a cosine over the budget takes it to lr_end."""

    lr_end: float = 1e-5
    """Learning rate at the end of the budget."""

    warmup: int = 10_000
    """Images over which the learning rate rises from 0; at most half the budget."""

    beta1: float = 0.9
    """AdamW's decay of the first moment."""

    beta2: float = 0.99
    """AdamW's decay of the second moment."""

    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""

    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    ema: float = 0.0
    """Decay a step of an exponential moving average of the weights, used by evaluation; 0: none."""

    accumulate: int = 1
    """Micro-batches a step: batch = images of a micro-batch x accumulate x ranks."""

    precision: str = ""
    """fp32, bf16 or fp16 for forward and backward; weights are float32. Empty: as the launcher says; auto: if that is
    nothing, bf16 where the hardware multiplies it, else fp32."""

    compile: bool = False
    """Compile the network with torch.compile."""

    channels_last: bool = False
    """Keep images in memory with the channels of a pixel together, which GPUs' convolutions prefer."""

    recompute: bool = False
    """Activation checkpointing: forget each block's activations and compute them again for the backward."""

    bad_steps: int = 10
    """So many steps in a row with a loss or gradient that is not finite stop the run; each of them is skipped."""

    threads: int = 0
    """CPU threads a rank; 0: this machine's cores shared among its ranks."""

    timeout: int = 600
    """Seconds a rank waits for the others before it fails."""


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    rounds: int = 1
    """Rounds between reports (TensorBoard scalars and metrics.jsonl)."""

    pictures: int = 25
    """Rounds between image grids; 0: none."""

    trackers: str = "tensorboard"
    """Where to report besides metrics.jsonl: names with commas between them. Other packages may bring more."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    rounds: int = 25
    """Rounds between checkpoints; one is always written at the end."""

    keep: int = 2
    """Complete checkpoints that are kept, the newest ones; 0 keeps all."""

    keep_every: int = 0
    """Also keep, for good, those after a number of rounds that this divides; 0: none."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    path: str = "runs/mnist"
    """Folder of the run: configuration, metrics, pictures, checkpoints, evaluation. All ranks must see the same one,
    unless `remote` is set."""

    remote: str = ""
    """s3://bucket/prefix: the run is copied there as it goes, and resumes from there if `path` has nothing newer."""


@dataclass(kw_only=True, slots=True)
class StopConfig:
    within: float = 25.0
    """Seconds after SIGTERM, SIGUSR1 or Ctrl-C in which the run must have written a checkpoint and ended: torchrun and
    Accelerate, if they are sent the signal, kill their ranks after 30."""


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    rounds: str = ""
    """Rounds of which every rank writes a trace for TensorBoard: 3 or 3-4; empty: none."""


@dataclass(kw_only=True, slots=True)
class Config:
    """Train an idempotent generative network. `--config FILE` reads a YAML first; options given here override it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    seed: int = 0
    """Everything random is a function of this, the round and an image's or a latent's number."""

    resume: str = "auto"
    """auto: go on from the newest complete checkpoint of run.path; changed: also with another data.path, train.images,
    lr, lr_end, warmup, clip or weight_decay than it had; never: start anew, refusing a folder in use."""


FREE_TO_CHANGE = (
    *("data.endpoint", "data.source", "data.workers", "data.check", "data.broken", "data.cache", "data.trace"),
    *("match.method", "report.", "checkpoint.", "run.", "stop.", "profile.", "resume"),
    *("train.threads", "train.timeout", "train.bad_steps", "train.accumulate", "train.precision"),
    *("train.compile", "train.channels_last", "train.recompute"),
)
"""Keys that a resumed run may change: they touch nothing that is computed, but for rounding. Others are an error."""


MAY_CHANGE = (
    *("data.path", "train.images", "train.lr", "train.lr_end", "train.warmup", "train.clip", "train.weight_decay"),
)
"""Keys that resume=changed lets a resumed run change besides: what follows is another run than was begun."""

RESUME = ("auto", "changed", "never")


def parse(arguments: Sequence[str]) -> Config:
    """The configuration of a command line; InputError or exit code 2 on anything unknown or impossible."""
    arguments, base = list(arguments), Config()
    for at, word in enumerate(arguments):
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or (arguments[at + 1] if at + 1 < len(arguments) else "")
            del arguments[at : at + (1 if "=" in word else 2)]
            base = load(path)
            break
    config = tyro.cli(Config, args=arguments, default=base, prog="accelerate launch pipeline/train.py")
    check(config)
    return config


def load(path: str) -> Config:
    """The configuration of a YAML file; keys that it does not name keep their defaults."""
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        there = ", ".join(sorted(str(file) for file in Path("configs").glob("*.yaml"))) or "none"
        raise InputError(f"no configuration file '{path}'; configs/ has: {there}") from None
    except OSError as error:
        raise InputError(f"{path or '--config without a file'} cannot be read: {error.strerror}") from None
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        # Not the error's own words: they show what stands there, which may be no configuration but a secret.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: this is no YAML ({type(error).__name__}): see configs/mnist.yaml") from None
    return from_dict(content, where=path)


def from_dict(content: Any, *, where: str) -> Config:
    config: Config = _build(Config, content, where, "")
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """{'section.key': value} for every setting."""
    return dict(_leaves(to_dict(config)))


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: Config, new: Config) -> list[str]:
    """Settings that touch what is computed and differ, one readable line each."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before[key]} there, {after[key]} now"
        for key in before
        if before[key] != after[key] and not key.startswith(FREE_TO_CHANGE)
    ]


MOST = 2**62
"""Larger numbers mean nothing in any setting, and overflow where they are used."""

MOST_THREADS = 1024
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MOST_SECONDS = 10**7


def check(config: Config) -> None:
    """InputError on values that no run can have; what depends on the data or the world is checked where it is known."""
    train, match = config.train, config.match
    check_config(config.data)
    positive = (
        *("train.images", "train.batch", "train.passes", "train.lr", "train.timeout", "train.accumulate"),
        *("report.rounds", "checkpoint.rounds", "stop.within", "train.bad_steps"),
    )
    least_zero = (
        *("train.lr_end", "train.warmup", "train.weight_decay", "train.clip", "train.threads"),
        *("report.pictures", "checkpoint.keep", "checkpoint.keep_every", "data.workers", "seed"),
    )
    flat = flatten(config)
    for key, value in flat.items():
        if isinstance(value, (int, float)) and not abs(value) < MOST:
            raise InputError(f"{key} is {value}: it must be a finite number below {MOST:.1e}")
    for key in ("data.path", "run.path"):
        if not flat[key]:
            raise InputError(f"{key} is empty: name a folder")
    if train.threads > MOST_THREADS:
        raise InputError(f"train.threads is {train.threads}: at most {MOST_THREADS}; 0 takes this machine's cores")
    if train.timeout > MOST_SECONDS:
        raise InputError(f"train.timeout is {train.timeout} seconds: at most {MOST_SECONDS}")
    for key in positive:
        if not flat[key] > 0:
            raise InputError(f"{key} is {flat[key]}: it must be positive")
    for key in least_zero:
        if not flat[key] >= 0:
            raise InputError(f"{key} is {flat[key]}: it must be at least 0")
    for key in ("train.beta1", "train.beta2", "train.ema"):
        if not 0 <= flat[key] < 1:
            raise InputError(f"{key} is {flat[key]}: it must lie in [0, 1)")
    parse_rounds(config.profile.rounds)
    if "://" in config.run.path:
        raise InputError("run.path is a local folder: for the copy in a bucket there is run.remote")
    config.run.remote = config.run.remote.rstrip("/")
    if config.run.remote:
        open_store(config.run.remote)
        for key in ("run.path", "data.path"):
            if config.run.remote == flat[key].rstrip("/"):
                raise InputError(
                    f"run.remote and {key} are both {config.run.remote}: choose another place for the copy"
                )
    if train.precision not in ("", *PRECISIONS):
        raise InputError(f"train.precision is '{train.precision}': choose one of {', '.join(PRECISIONS)}")
    if config.resume not in RESUME:
        raise InputError(f"resume is '{config.resume}': choose one of {', '.join(RESUME)}")
    if match.round % train.batch:
        near = max(1, round(match.round / train.batch)) * train.batch
        raise InputError(
            f"match.round={match.round} is no multiple of train.batch={train.batch}: every step takes a whole batch of "
            f"the round's images; the nearest that fits is --match.round={near}"
        )


def _build(kind: Any, content: Any, where: str, prefix: str) -> Any:
    if not isinstance(content, dict):
        raise InputError(f"{where}: '{prefix.rstrip('.') or 'the file'}' must hold keys and values")
    hints, values = typing.get_type_hints(kind), {}
    for key, value in content.items():
        if key not in hints:
            known = [prefix + name for name in hints] if prefix else list(flatten(Config())) + list(hints)
            near = difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0.4)
            meant = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(hints)}"
            raise InputError(f"{where}: unknown key '{printable(f'{prefix}{key}')}'{meant}")
        target = hints[key]
        if dataclasses.is_dataclass(target):
            values[key] = _build(target, {} if value is None else value, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(target, value, f"{where}: {prefix}{key}")
    return kind(**values)


def _convert(target: Any, value: Any, where: str) -> Any:
    """YAML reads 1e-3 as text and 1 as an integer where a float is meant; anything else must have the right type."""
    try:
        if target is float and not isinstance(value, bool):
            return float(value)
        if target is int and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            if float(value) == int(float(value)):
                return int(float(value))
        elif isinstance(value, target):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{where} is {reprlib.repr(value)}: it must be {target.__name__}")
