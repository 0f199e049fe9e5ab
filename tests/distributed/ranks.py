"""Real gloo ranks, each a process."""

import socket
import subprocess
import sys

import torch

from tests.conftest import forked
from tests.programs import ends

WORKER = """
import importlib, os, sys
from datetime import timedelta
import torch, torch.distributed as dist
module, name = sys.argv[1].split(".")
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=float(sys.argv[3])))
result = getattr(importlib.import_module(f"tests.distributed.{module}"), name)(rank, world)
torch.save(result, f"{sys.argv[2]}/rank{rank}.pt")
if sys.argv[4] == "[]":  # with a rank missing there is nobody to say goodbye to
    dist.destroy_process_group()
os._exit(0)
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def started(command, world, *, begin=forked, **more):
    """A process for each rank; `begin` makes its environment."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    ranks = []
    for rank in range(world):
        env = begin(**address, RANK=str(rank), LOCAL_RANK=str(rank), **more)
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    return ranks


def on_ranks(
    case,  # module.function in tests/distributed, called with (rank, world)
    world,
    folder,  # for what they return
    *,
    timeout=120,  # seconds of the process group
    missing=frozenset(),  # ranks that return nothing
):
    """What each rank returned, in their order, without the missing."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-c",
        WORKER,
        case,
        str(folder),
        str(timeout),
        str(sorted(missing)),
    ]
    for worker in started(command, world):
        ends(worker, 0)
    found = []
    for rank in range(world):
        if rank not in missing:
            found.append(torch.load(folder / f"rank{rank}.pt", weights_only=True))
    return found
