"""The same with Accelerate's loader on torchdata's StatefulDataLoader, and its own checkpoints.

python accelerate_loop.py DATA STATE KEYS [STOP]: STATE and KEYS are folders. With STOP it begins and writes STATE, else
it resumes from it: whether STATE is there differs between ranks, since one may write it before the other has looked.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard

from naign import open_dataset


def main(data, state, keys, stop=0):
    accelerator = Accelerator(cpu=True)
    dataset = open_dataset(data, batch=90, seed=3)
    loader = DataLoaderShard(dataset, accelerator.device, batch_size=None, use_stateful_dataloader=True)
    accelerator.register_for_checkpointing(loader)
    if not stop:
        accelerator.load_state(str(state))
    with (keys / f"{accelerator.num_processes}-{accelerator.process_index}.txt").open("w") as lines:
        for step, batch in enumerate(loader, 1):
            lines.writelines(f"{key}\n" for key in batch.keys)
            if step == stop:
                accelerator.save_state(str(state))
                break
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
