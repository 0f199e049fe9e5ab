"""The match: which generated sample is nearest to each image, exactly, over all ranks."""

from naign.match.across_ranks import Answer, Blocks, NotFinite, nearest, search
from naign.match.matcher import Match, MatchConfig, match_round
