"""The main job, which adds a byte to steps-RANK in its folder after each optimizer step, for a test to wait for."""

import os
import runpy
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

if __name__ == "__main__":
    with Path(f"steps-{os.environ.get('RANK', '0')}").open("ab", buffering=0) as count:
        register_optimizer_step_post_hook(lambda *_: count.write(b"."))
        sys.argv[0] = str(Path(__file__).parents[2] / "pipeline/train.py")
        runpy.run_path(sys.argv[0], run_name="__main__")
