"""`normal` and `uniform` under their public name: row i of a latent depends on (seed, round, ids[i]) alone.

The generator itself lies in `pipeline.philox`, below the other rooms that draw from it. This module keeps the stable
name `pipeline.match.latents.normal`.
"""

from pipeline.philox import normal, uniform

__all__ = ["normal", "uniform"]
