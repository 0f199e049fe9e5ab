"""The stable names of `pipeline.philox`'s generators, of which row i depends on (seed, round, ids[i]) alone."""

from pipeline.philox import normal as normal
from pipeline.philox import uniform as uniform
