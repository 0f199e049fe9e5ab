"""The main job with a processor clock that goes on by rank + 1 seconds whenever it is read."""

import itertools
import os
import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    time.process_time = itertools.count(0.0, 1.0 + int(os.environ.get("RANK", "0"))).__next__
    sys.argv[0] = str(Path(__file__).parents[2] / "pipeline/train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
