"""Training: prepare a run, resume it, run its rounds. `train` is in loop.py, apart since it imports all rooms."""

from pipeline.training.run_folder import is_done
