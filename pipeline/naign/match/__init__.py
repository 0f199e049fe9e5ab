"""The match: which generated sample is nearest to each image, exactly, over all ranks."""

from naign.match.index import Blocks, NotFinite, SearchResult, nearest, search
from naign.match.matcher import Match, MatchConfig, match_round
