"""The match: which generated sample is nearest to each image, exactly, over all ranks."""

from pipeline.match.across_ranks import Answer, Blocks, NotFinite, nearest, search
from pipeline.match.matcher import Match, MatchConfig, match_round
