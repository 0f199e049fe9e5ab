"""`normal` and `uniform` of `pipeline.philox` under their stable name: row i depends on (seed, round, ids[i]) alone."""

from pipeline.philox import normal as normal
from pipeline.philox import uniform as uniform
