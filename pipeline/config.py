"""The configuration of a run: defaults of dataclasses, then a YAML file, then `--section.key=value`; the last one wins.

The settings class of a section in NAMED depends on the name that is chosen.
"""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
import yaml

from pipeline import shipped
from pipeline.data.dataset import DataConfig, check_config
from pipeline.errors import InputError, printable, require, shown
from pipeline.match.matcher import MatchConfig
from pipeline.model import losses, networks
from pipeline.observe.speed import parse_rounds
from pipeline.observe.trackers import find_trackers
from pipeline.settings.constraints import (
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
from pipeline.settings.read import convert
from pipeline.storage.store import open_store

to_dict = dataclasses.asdict
MOST = 2**62  # no setting has a use for larger numbers, which overflow


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    images: int = field(default=300_000, metadata=MAY_CHANGE | POSITIVE)
    """Budget: images trained on, over all ranks and passes; rounded up to whole rounds."""
    batch: int = field(default=128, metadata=POSITIVE)
    """Images per step, over all ranks."""
    passes: int = field(default=1, metadata=POSITIVE)
    """Passes of SGD over a round's images before they are matched anew."""
    lr: float = field(default=2e-3, metadata=MAY_CHANGE | POSITIVE)
    """Peak learning rate of AdamW; a cosine over the budget takes it to lr_end."""
    lr_end: float = field(default=1e-5, metadata=MAY_CHANGE | AT_LEAST_0)
    """Learning rate at the end of the budget."""
    warmup: int = field(default=10_000, metadata=MAY_CHANGE | AT_LEAST_0)
    """Images over which the learning rate rises from 0; at most half the budget."""
    beta1: float = field(default=0.9, metadata=SHARE)
    """AdamW's decay of the first moment."""
    beta2: float = field(default=0.99, metadata=SHARE)
    """AdamW's decay of the second moment."""
    weight_decay: float = field(default=0.01, metadata=MAY_CHANGE | AT_LEAST_0)
    """AdamW's decoupled weight decay."""
    clip: float = field(default=1.0, metadata=MAY_CHANGE | AT_LEAST_0)
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = field(default=0.0, metadata=SHARE)
    """Decay per step of an exponential moving average of the weights, which evaluation uses; 0: none."""
    accumulate: int = field(default=1, metadata=FREE | POSITIVE)
    """Micro-batches per step: batch = micro-batch x accumulate x ranks. With drift or moments it may not change."""
    precision: str = field(default="", metadata=FREE | one_of(("", "auto", "fp32", "bf16", "fp16")))
    """fp32, bf16 or fp16 for forward and backward; weights are float32. Empty: as configured in the launcher. auto: the
    same, but without a configuration bf16 if the hardware multiplies it, else fp32."""
    compile: bool = field(default=False, metadata=FREE)
    """Compile the network with torch.compile."""
    graphs: bool = field(default=False, metadata=FREE)
    """Compile the network and, on a GPU, replay its kernels as CUDA graphs, with one launch for each pass. The graphs
    keep their memory, separately for each batch size."""
    channels_last: bool = field(default=False, metadata=FREE)
    """Use the channels-last memory format (NHWC), which convolutions on GPUs prefer."""
    recompute: bool = field(default=False, metadata=FREE)
    """Activation checkpointing: drop the activations of each block and recompute them in the backward pass."""
    bad_steps: int = field(default=10, metadata=FREE | POSITIVE)
    """Stop the run after so many steps in a row whose loss or gradient is not finite. Each of them is skipped."""
    threads: int = field(default=0, metadata=FREE | between(0, 1024))
    """CPU threads per rank. 0: OMP_NUM_THREADS, or under a launcher, which sets that to 1, the rank's share of the
    cores."""
    timeout: int = field(default=600, metadata=FREE | between(1, 10**7))
    """Seconds a rank waits for the others before it fails."""


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    rounds: int = field(default=1, metadata=POSITIVE)
    """Rounds between reports (TensorBoard scalars and metrics.jsonl)."""
    pictures: int = field(default=25, metadata=AT_LEAST_0)
    """Rounds between image grids; 0: none."""
    trackers: str = "tensorboard"
    """Where to report besides metrics.jsonl: names, as [tensorboard, wandb], of TensorBoard, of Accelerate's trackers
    (wandb, mlflow, trackio, ...) and of those that other packages bring. docs/tracking.md has what each is told."""


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
    split: str = field(default="train", metadata=NOT_EMPTY)
    """Split of the real examples. Never choose a checkpoint by the split that you report on."""
    patience: int = field(default=0, metadata=AT_LEAST_0)
    """Stop the run after so many measurements in a row that are no better than the best; 0: never."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    path: str = field(default="runs/mnist", metadata=NOT_EMPTY)
    """Folder of the run: metrics, pictures, checkpoints, evaluation. All ranks must see it, unless `remote` is set."""
    remote: str = ""
    """s3://bucket/prefix: the run is copied there while it trains, and resumes from there if `path` has nothing
    newer."""


@dataclass(kw_only=True, slots=True)
class StopConfig:
    within: float = field(default=25.0, metadata=POSITIVE)
    """Seconds from SIGTERM, SIGUSR1, SIGHUP or Ctrl-C until a checkpoint is written and the run exits. torchrun and
    Accelerate kill after 30."""


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    rounds: str = ""
    """Rounds that every rank traces for TensorBoard, as 3 or 3-4; empty: none."""


@dataclass(kw_only=True, slots=True)
class Config:
    """Train an idempotent generative network. `--config` reads a YAML first, a file or a name such as digits; options
    given here override it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: networks.NetworkConfig = field(default_factory=networks.ConvConfig)
    objective: losses.ObjectiveConfig = field(default_factory=losses.NaignConfig)
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
    index, train.images, lr, lr_end, warmup, clip or weight_decay. never: start from scratch; refuse a folder in use."""


NAMED: dict[str, tuple[str, Callable[[str], tuple[Any, Any]], dict[str, str]]] = {
    "model": ("conv", networks.find_network, networks.FORMER),
    "objective": ("naign", losses.find_objective, losses.FORMER),
}
"""Sections whose settings class depends on a name: the default name, the lookup of a name's class, and the settings
that all choices once shared in one class, with the choices that have them now."""

RENAMED = {"model.kind": "model.name"}
"""Keys of earlier versions and their present names; "" for settings that were removed."""


def parse(arguments: Sequence[str], about: str | None = None) -> Config:
    """The configuration of a command line; InputError or exit code 2 on anything unknown or impossible.

    `about` stands at the top of --help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?", const="")
    for section in NAMED:
        former = [f"--{old}" for old, new in RENAMED.items() if new == f"{section}.name"]
        first.add_argument(f"--{section}.name", *former, dest=section, nargs="?", const="")
    given, rest = first.parse_known_args(list(arguments))
    content: Any = {} if given.config is None else _read(given.config)
    where = given.config or "the command line"
    for section in NAMED:
        name = getattr(given, section)
        if name is not None and isinstance(content, dict) and isinstance(there := content.get(section) or {}, dict):
            content[section] = there | {"name": name}
    base = from_dict(content, where=where)
    for word in rest:
        section, _, key = word.partition("=")[0].removeprefix("--").replace("-", "_").partition(".")
        if section in NAMED and key not in flatten(getattr(base, section)):
            _refuse_former(section, key, getattr(base, section).name, "the command line")
    config = tyro.cli(Config, args=rest, default=base, prog="naign train", description=about)
    check(config)
    find_trackers(config.report.trackers)  # here, since a run is read where its trackers need not be installed
    return config


def load(path: str) -> Config:
    """The configuration of a YAML file, or of a name in configs/; keys that it does not name keep their defaults."""
    return from_dict(_read(path), where=path)


def find_config(name: str) -> Path:
    """The YAML file that `name` means: a file's path, or the name of one in configs/, such as digits."""
    file = Path(name)
    known = Path() if file.is_file() or file.name != name else shipped(f"configs/{name}.yaml")
    return known if known.is_file() else file


def _read(path: str) -> Any:
    try:
        return yaml.safe_load(find_config(path).read_text()) or {}
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in shipped("configs").glob("*.yaml")))
        raise InputError(f"no configuration file '{path}': give a file, or one of these names: {names}") from None
    except OSError as error:
        raise InputError(f"{path or '--config without a file'} cannot be read: {error.strerror}") from None
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        # Do not quote the error: it shows the content of the file, which may be a secret.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: this is no YAML ({type(error).__name__}): see configs/mnist.yaml") from None


def from_dict(content: Any, *, where: str, recorded: bool = False) -> Config:
    """The configuration with the keys and values of the file `where`. Raises InputError if it is invalid.

    In the record of a run (`recorded`), settings of earlier versions that no longer exist are ignored.
    """
    config: Config = _build(Config, content, where, "", recorded)
    check(config)
    return config


def flatten(config: Any) -> dict[str, Any]:
    """{'section.key': value} for every setting, also of one section."""
    return {key: value for key, value, _ in _leaves(config)}


def changeable(config: Config, metadata: dict[str, Any]) -> set[str]:
    """The keys of the settings with the metadata FREE or MAY_CHANGE, whichever is given."""
    fixed = {"train.accumulate"} if config.objective.needs_fresh else set()  # the samples of a micro-batch are compared
    return {key for key, _, change in _leaves(config) if change == metadata["change"]} - fixed


def _leaves(settings: Any, prefix: str = "", change: str = "") -> Iterator[tuple[str, Any, str]]:
    for one in dataclasses.fields(settings):
        key, value, own = prefix + one.name, getattr(settings, one.name), one.metadata.get("change", change)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.", own)
        else:
            yield key, value, own


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
    check_fields(config, "")
    for one in dataclasses.fields(config):
        if dataclasses.is_dataclass(section := getattr(config, one.name)):
            check_fields(section, one.name)
    model, objective = config.model, config.objective
    if model.only_with not in ("", objective.name) or objective.only_with not in ("", model.name):
        said = f"model.name={model.name} and objective.name={objective.name} do not go together"
        raise InputError(f"{said}: choose the same name for both, or another network and objective")
    parse_rounds(config.profile.rounds)
    patience, rounds = config.quality.patience, config.quality.rounds
    never = f"quality.patience is {patience}, but nothing is measured while quality.rounds is 0: set both"
    require((rounds or not patience, never))
    require(("://" not in config.run.path, "run.path is a local folder: for the copy in a bucket there is run.remote"))
    config.run.remote = remote
    if remote:
        open_store(remote)
        for key in ("run.path", "data.path"):
            same = remote == flat[key].rstrip("/")
            require((not same, f"run.remote and {key} are both {remote}: choose another place for the copy"))
    size, batch = config.match.round, config.train.batch
    if size % batch:
        raise InputError(
            f"match.round={size} is no multiple of train.batch={batch}: every step takes a whole batch of the round's "
            f"images; the nearest that fits is --match.round={max(1, round(size / batch)) * batch}"
        )


def _build(kind: Any, content: Any, where: str, prefix: str, recorded: bool) -> Any:
    section = prefix.rstrip(".")
    if not isinstance(content, dict):
        raise InputError(f"{where}: '{section or 'the file'}' must hold keys and values")
    require((all(isinstance(key, str) for key in content), f"{where}: a key of '{section or 'the file'}' is no text"))
    names = {key: (RENAMED.get(f"{prefix}{key}") or f"{prefix}{key}").removeprefix(prefix) for key in content}
    content = {names[key]: value for key, value in content.items()}
    if section in NAMED:
        default, find, former = NAMED[section]
        content = {"name": default, **content}
        kind = find(convert(str, content["name"], f"{where}: {prefix}name"))[0]
        recorded = recorded or former.keys() <= content.keys()  # config.yaml of an earlier version
    hints, values = typing.get_type_hints(kind), {}
    for key, value in content.items():
        if key in hints and dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], {} if value is None else value, where, f"{prefix}{key}.", recorded)
        elif key in hints:
            if f"{prefix}{key}" in ("data.path", "report.trackers") and isinstance(value, list):
                with suppress(ValueError):  # a number with too many digits, which is refused below
                    value = yaml.safe_dump(value, default_flow_style=True, width=MOST).strip()
            values[key] = convert(hints[key], value, f"{where}: {prefix}{key}")
        elif not (recorded and (RENAMED.get(f"{prefix}{key}") == "" or section in NAMED and key in NAMED[section][2])):
            if RENAMED.get(f"{prefix}{key}") == "":
                raise InputError(f"{where}: {prefix}{key} is no longer a setting: leave it out")
            _refuse_former(section, key, content.get("name"), where)
            known = [prefix + name for name in hints] if prefix else list(flatten(Config())) + list(hints)
            near = difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0.4)
            meant = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(hints)}"
            brief = key if re.fullmatch(r"[\w.]{1,40}", key) else f"{printable(key, 8)}..."  # may be a line of secrets
            raise InputError(f"{where}: unknown key '{prefix}{brief}'{meant}")
    return kind(**values)


def _refuse_former(section: str, key: str, name: Any, where: str) -> None:
    """Raise InputError if the setting belongs to another choice of the section."""
    if section in NAMED and (owners := NAMED[section][2].get(key)):
        said = f"{where}: {section}.{key} is no setting of {section}.name={name}, but of {owners}"
        raise InputError(f"{said}: leave it out, or choose another {section}.name")
