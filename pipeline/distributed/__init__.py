"""The ranks of a training: the engine that runs the network on them, and how they agree, stop and end together."""

from pipeline.distributed.connect import build_accelerator
from pipeline.distributed.engine import Engine
from pipeline.distributed.host import keep_memory, set_threads, warn_of_others
from pipeline.distributed.ranks import (
    broadcast,
    broadcast_object,
    gather,
    is_peer_lost,
    part,
    peers_missed,
    reduce,
    together,
    total,
)
from pipeline.distributed.signals import StopPoll, StopRequest
from pipeline.distributed.watchdog import Watchdog
from pipeline.distributed.zero import ZeroEngine
