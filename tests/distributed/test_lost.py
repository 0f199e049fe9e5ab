"""A rank that loses another one says so in a line, with the code for it; one that fails by itself does not."""

import signal
import sys

import pytest
import torch.distributed as dist

from naign.distributed.ranks import is_peer_lost
from naign.errors import PEER_LOST
from tests.conftest import environment, forked
from tests.distributed.ranks import started
from tests.programs import ends

LOADING = """
import os, signal, sys, time
from contextlib import nullcontext
from types import SimpleNamespace
from pipeline.train import build_accelerator, exit_on_input_error, peers_missed
from naign.distributed.signals import StopRequest
from naign.distributed.watchdog import Watchdog
from naign.training.loop import read_round

rank, lost, wait = int(os.environ["RANK"]), int(sys.argv[1]), sys.argv[2]

class Stream:
    rows_read = 0

    def take(self, number, cancelled):  # its store does not answer
        looks = 0
        while rank != lost or looks < 3:
            looks += wait == "read" and not cancelled()
            looks += wait == "store" and not stop.seen()
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

with exit_on_input_error("train"), peers_missed():
    accelerator, stop = build_accelerator(), StopRequest(world=2, timeout=60)
    accelerator.wait_for_everyone()
    watchdog = Watchdog(rank=rank, timeout=60)
    run = SimpleNamespace(accelerator=accelerator, stop=stop, watchdog=watchdog, stream=Stream())
    run.phases = SimpleNamespace(alone=lambda phase: nullcontext())
    read_round(run, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "wait"),
    [
        (0, "read"),
        (0, "store"),
        (1, "read"),
    ],
)
def test_a_rank_that_is_lost_while_data_are_read_is_told_in_a_line(lost, wait):
    begin = environment if wait == "store" else forked  # what torch itself logs is settled where it is imported
    command = [sys.executable, "-c", LOADING, str(lost), wait]
    ranks = started(command, 2, begin=begin, ACCELERATE_USE_CPU="true")
    ends(ranks[lost], -signal.SIGKILL)
    (line,) = ends(ranks[1 - lost], PEER_LOST).splitlines()
    assert line.startswith(f"train: rank {1 - lost} lost another rank, and ends (")


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {}, NCCL version 2.29.7\n{}\nLast error:\n{}"
)
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
CUDA = "ncclUnhandledCudaError: Call to CUDA function failed."
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
TIMEOUT = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600001 ms"
)
BROKEN, RESET = "Net : Call to recv from 10.0.0.7<33759> failed : Broken pipe", "Connection reset by peer"
SHARED = "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888): No space left on device (28)"


def nccl(kind, last):
    return dist.DistBackendError(NCCL.format("some error", kind, last))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), True),
        (dist.DistNetworkError("The server socket has failed to listen on any local network address."), False),
        (dist.DistStoreError("wait timeout after 60000ms, keys: /default_pg/0//cpu//1/rank_1"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:2"), True),
        (nccl(REMOTE, BROKEN), True),
        (dist.DistBackendError(TIMEOUT), True),
        (nccl(SYSTEM, SHARED), False),
        (nccl(USAGE, "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"), False),
        (nccl(CUDA, RESET), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError(104, RESET), False),  # not of a collective
    ],
)
def test_what_is_a_lost_rank(error, lost):
    assert is_peer_lost(error) is lost
