"""Another prior for a trained model: a Gaussian mixture fitted to the codes of its training
images."""

import time
from dataclasses import asdict

import torch

from pipeline.data.loader import read_split
from pipeline.errors import InputError
from pipeline.evaluate.recorded import recorded
from pipeline.model.naign import NAIGN
from pipeline.model.networks import Autoencoder
from pipeline.model.prior.fitted import fit_mixture
from pipeline.model.prior.gmm import GmmConfig
from pipeline.model.scale import scaled

IMAGES = 60_000  # whose codes are fitted, at most


def with_mixture(
    model: NAIGN,
    folder: str,  # that it was read from
    *,
    components: int = 50,
    data: str | None = None,  # packed data set; None: the one it was trained on
    seed: int = 0,
    batch: int = 500,
) -> NAIGN:
    """The same f with latents z = decode(code), the code drawn from a mixture fitted to those of training images.

    The processor time of the fit is added to the training's. Raises InputError for an f without a code, too few images,
    and as `evaluate` does for the data.
    """
    if not isinstance(model.network, Autoencoder):
        name = model.metadata.get("model", {}).get("name", "mlp")
        raise InputError(f"the model in {folder} has no code for a mixture: model.name={name}, not conv or spatial")
    begin = time.process_time()
    config, _, _ = recorded(model, folder, data)
    images, _ = read_split(config, config.split, limit=IMAGES)
    with torch.inference_mode():
        parts = [model.network.encode(scaled(part).to(model.device)) for part in images.split(batch)]
    codes = torch.cat(parts).float().cpu()
    state = {name: value.to(model.device) for name, value in fit_mixture(codes, components, seed=seed).items()}
    spent = time.process_time() - begin
    metadata = model.metadata | {"prior": asdict(GmmConfig(components=components))}
    metadata["fit"] = {"images": len(codes), "cpu_seconds": spent}
    if isinstance(trained := metadata.get("cpu_seconds"), int | float):
        metadata["cpu_seconds"] = trained + spent
    return NAIGN(model.network, metadata, state)
