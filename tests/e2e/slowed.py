"""The main job with a rank 1 whose samples take longer, where a slow rank is named after a second."""

import os
import runpy
import sys
import time
from pathlib import Path

from naign.distributed.engine import Engine
from naign.observe import stragglers

if __name__ == "__main__":
    stragglers.SUSPECTED = 1.0
    sample = Engine.sample

    def slowed(engine, x):
        time.sleep(0.1)
        return sample(engine, x)

    if os.environ["RANK"] == "1":
        Engine.sample = slowed
    sys.argv[0] = str(Path(__file__).parents[2] / "pipeline/train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
