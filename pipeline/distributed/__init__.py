"""The ranks of a training: the engine that runs the network on them, and how they agree, stop and end together."""

from pipeline.distributed.engine import MOMENTS as MOMENTS
from pipeline.distributed.engine import AdamState as AdamState
from pipeline.distributed.engine import Engine as Engine
from pipeline.distributed.ranks import build_accelerator as build_accelerator
from pipeline.distributed.ranks import is_peer_lost as is_peer_lost
from pipeline.distributed.ranks import keep_memory as keep_memory
from pipeline.distributed.ranks import peers_missed as peers_missed
from pipeline.distributed.ranks import set_threads as set_threads
from pipeline.distributed.ranks import together as together
from pipeline.distributed.ranks import total as total
from pipeline.distributed.ranks import warn_of_others as warn_of_others
from pipeline.distributed.signals import StopPoll as StopPoll
from pipeline.distributed.signals import StopRequest as StopRequest
from pipeline.distributed.versions import check_versions as check_versions
from pipeline.distributed.watchdog import Watchdog as Watchdog
