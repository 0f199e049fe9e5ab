"""A PyTorch loop over `open_dataset`, on any number of gloo ranks: stops after some batches, or goes to an epoch's end.

python plain_loop.py DATA STATE KEYS [STOP]: STATE is resumed from where it is there; KEYS is a folder.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from naign import open_dataset


def main(data, state, keys, stop=0):
    dist.init_process_group("gloo")
    dataset = open_dataset(data, batch=90, seed=3, flip=True)
    if state.exists():
        dataset.load_state_dict(torch.load(state))
    network = nn.parallel.DistributedDataParallel(nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with (keys / f"{dist.get_world_size()}-{dist.get_rank()}.txt").open("w") as lines:
        for step, batch in enumerate(dataset, 1):
            nn.functional.cross_entropy(network(batch.images.flatten(1)), batch.labels).backward()
            optimizer.step()
            sums = batch.images.double().mul(torch.arange(64).view(1, 1, 8, 8)).sum((1, 2, 3))
            lines.writelines(f"{key} {total:.6f}\n" for key, total in zip(batch.keys, sums.tolist(), strict=True))
            if step == stop:
                break
    if dist.get_rank() == 0:
        torch.save(dataset.state_dict(), state)
    dist.barrier()
    os._exit(0)  # freeing DDP's gloo group may wait for ever for one of its threads, which waits for the interpreter


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
