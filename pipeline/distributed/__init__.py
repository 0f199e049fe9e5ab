"""The ranks of a training: the engine that runs the network on them, and how they agree, stop and end together."""

from pipeline.distributed.engine import MOMENTS, AdamState, Engine
from pipeline.distributed.ranks import (
    build_accelerator,
    is_peer_lost,
    keep_memory,
    part,
    peers_missed,
    set_threads,
    together,
    total,
    warn_of_others,
)
from pipeline.distributed.signals import StopPoll, StopRequest
from pipeline.distributed.versions import check_versions
from pipeline.distributed.watchdog import Watchdog
from pipeline.distributed.zero import ZeroEngine
