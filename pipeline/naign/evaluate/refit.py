"""A Gaussian mixture fitted to the codes of a trained f, as another prior of its samples (arXiv 1903.12436)."""

import time
from dataclasses import asdict
from typing import Any

import torch

from naign.data.loader import read_split
from naign.data.scale import scaled
from naign.evaluate.recorded import recorded
from naign.model.naign import NAIGN
from naign.model.networks import code_shape
from naign.model.prior import Codes, Mixture, MixtureConfig

IMAGES = 60_000  # whose codes are fitted, at most


def with_mixture(model: NAIGN, folder: str, *, components: int) -> NAIGN:
    """The same f with samples of a mixture that is fitted to the codes of training images.

    `folder` is where the model was read from. The fit's processor time is added to the training's. Raises InputError
    for an f without a code, too few images, or unfit data.
    """
    code = code_shape(model.network, f"a mixture for the model in {folder}")
    begin = time.process_time()
    config, _ = recorded(model, folder, None)
    images, _ = read_split(config, config.split, limit=IMAGES)
    settings = MixtureConfig(components=components, images=len(images))
    settings.check_codes(len(images), code)
    encode: Any = model.network.encode
    parts = []
    with torch.inference_mode():
        for part in images.split(500):
            codes = encode(scaled(part).to(model.device))
            parts.append(codes.float())
    mixture = Mixture(settings, code).to(model.device)
    for _ in mixture.fit(Codes.of(torch.cat(parts))):
        pass
    spent = time.process_time() - begin
    metadata = model.metadata | {
        "prior": asdict(settings),
        "fit": {"images": len(images), "cpu_seconds": spent},
    }
    metadata.pop("labels", None)  # of classes, which the mixture does not tell apart
    trained = metadata.get("cpu_seconds")
    if isinstance(trained, int | float):
        metadata["cpu_seconds"] = trained + spent
    state = {name: value for name, value in model.state.items() if name.startswith("latents.")}
    state |= {f"prior.{name}": value for name, value in mixture.state_dict().items()}
    return NAIGN(model.network, metadata, state)
