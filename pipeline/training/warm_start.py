"""Begin a run from the weights of a model that was trained before."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.checkpoint import newest_checkpoint, newest_first
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.model.naign import NAIGN
from pipeline.model.networks import recorded_network
from pipeline.model.prior import Prior

log = logging.getLogger("naign.train")


def warm_start(config: Config, network: nn.Module, prior: Prior) -> None:
    """Load what fits of the model at model.init, unless there is a checkpoint to go on from.

    The state of its prior is loaded whole or not at all. Raises InputError for a model of another kind, or without any
    weight that fits.
    """
    folder, remote = Path(config.run.path) / "checkpoints", config.run.remote
    if newest_checkpoint(folder) or (remote and next(iter(newest_first(remote)), None)):
        return
    place = config.model.init
    model = NAIGN.from_pretrained(place)
    name = recorded_network(model.metadata["model"]).name
    if name != config.model.name:
        raise InputError(f"model.init={place} is a model of model.name={name}, this run's is {config.model.name}")
    taken = _load_fitting(network, model.network.state_dict())
    wanted = network.state_dict()
    if not taken:
        raise InputError(f"model.init={place} fits nothing of this network: no weight has its name and its shape")
    fresh = ", ".join(sorted(wanted.keys() - taken))
    log.info("%d of %d weights are from %s%s", len(taken), len(wanted), place, f", not {fresh}" if fresh else "")
    state = model.prior.state_dict()
    if type(model.prior) is type(prior) and _shapes(state) == _shapes(prior.state_dict()):
        prior.load_state_dict(state)


def _load_fitting(network: nn.Module, found: Mapping[str, Tensor]) -> set[str]:
    """Names of the weights that the network takes over."""
    wanted = network.state_dict()
    fits = {name: value for name, value in found.items() if name in wanted and value.shape == wanted[name].shape}
    network.load_state_dict(wanted | fits)
    return set(fits)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
