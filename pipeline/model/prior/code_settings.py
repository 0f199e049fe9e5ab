"""What the priors of codes share. f is an autoencoder: image -> code -> f(image).

The prior learns the distribution of the codes of the data while f trains, and then alone, with f as it is. A latent is
z = decode(code) of a drawn code: it is near the data already, f(z) is one evaluation of f, and the match has only to
repair what is left.
"""

from dataclasses import dataclass, field

from pipeline.errors import InputError
from pipeline.model.prior.base import PriorConfig
from pipeline.settings.constraints import between

WINDOW = 5  # rounds over which the mean and the covariance of codes are averaged, while f moves them


@dataclass(kw_only=True, slots=True)
class CodesConfig(PriorConfig):
    """Base of the settings of priors of codes."""

    begin: float = field(default=0.5, metadata=between(0, 0.99))
    """Share of train.images before which codes are drawn from one Gaussian, of the mean and the covariance of the
    codes. Use 0 if matched latents are to move f."""
    alone: float = field(default=0.5, metadata=between(0, 0.99))
    """Share of train.images, at the end, over which f is frozen and only the prior learns."""

    def __post_init__(self) -> None:
        PriorConfig.__post_init__(self)
        if self.begin + self.alone > 1 + 1e-9:
            raise InputError(
                f"prior.begin is {self.begin:g} and prior.alone {self.alone:g}: between f's last step and the prior's "
                f"first nothing would learn; at most 1 together"
            )
