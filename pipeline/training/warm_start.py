"""Begin a run from the weights of a model that was trained before."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline.checkpoint.bucket import newest_first
from pipeline.checkpoint.writer import newest_checkpoint
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.model.naign import NAIGN
from pipeline.model.prior import Prior
from pipeline.training.state import shapes_of

log = logging.getLogger("naign.train")


class Start(NamedTuple):
    """What a run takes of the model at model.init, on the CPU."""

    metadata: dict[str, Any]
    weights: dict[str, Tensor]
    prior: dict[str, Tensor]


def read_start(config: Config) -> Start | None:
    """The model at model.init; None if there is none, or a checkpoint to resume from. For rank 0, which shares it."""
    folder, remote = Path(config.run.path) / "checkpoints", config.run.remote
    if not config.model.init or newest_checkpoint(folder) or (remote and next(iter(newest_first(remote)), None)):
        return None
    model = NAIGN.from_pretrained(config.model.init)
    return Start(model.metadata, model.network.state_dict(), model.prior.state_dict())


def warm_start(config: Config, start: Start, network: nn.Module, prior: Prior) -> None:
    """Load the weights whose name and shape agree. The state of the prior is loaded whole or not at all.

    Raises InputError for a model of another kind, or without any weight that fits.
    """
    place, name = config.model.init, start.metadata["model"]["name"]
    if name != config.model.name:
        raise InputError(f"model.init={place} is a model of model.name={name}, this run's is {config.model.name}")
    state = network.state_dict()
    fits = {key: value for key, value in start.weights.items() if key in state and value.shape == state[key].shape}
    if not fits:
        raise InputError(f"model.init={place} fits nothing of this network: no weight has its name and its shape")
    network.load_state_dict(state | fits)
    others = ", ".join(sorted(state.keys() - fits.keys()))
    log.info("%d of %d weights are from %s%s", len(fits), len(state), place, f", not {others}" if others else "")
    same_prior = start.metadata["prior"]["name"] == config.prior.name
    if same_prior and shapes_of(start.prior) == shapes_of(prior.state_dict()):
        prior.load_state_dict(start.prior)
