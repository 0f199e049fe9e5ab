"""The main job: `accelerate launch pipeline/train.py [--config FILE] [--section.key=value ...]`."""

# ruff: noqa: E402

import gc
import sys
from pathlib import Path

# In a script sys.path starts with the script's own folder, where `data` or `match` would shadow libraries.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

from pipeline.errors import INTERRUPTED, exit_on_input_error, leave, leave_on_failure, leave_when_asked, record_exit

if __name__ == "__main__":
    leave_when_asked()  # before imports of seconds: there is nothing to keep until training handles signals itself

gc.disable()  # Imports make no garbage, and collecting it would take a quarter of their time; train() enables it.

from pipeline.config import parse
from pipeline.distributed.connect import build_accelerator
from pipeline.distributed.host import keep_memory, set_threads
from pipeline.distributed.ranks import part, peers_missed, together
from pipeline.observe import trackers_hang
from pipeline.storage.store import use_endpoint
from pipeline.terminal import outlive_terminal
from pipeline.training.loop import train
from pipeline.training.prepare import pack_missing


def main() -> None:
    outlive_terminal()
    arguments = sys.argv[1:]
    with leave_on_failure(), exit_on_input_error("train"), peers_missed():
        config = parse(arguments)
        use_endpoint(config.data.endpoint)
        keep_memory()
        settings = config.train
        set_threads(settings.threads)
        accelerator = build_accelerator(settings.timeout, precision=settings.precision, accumulate=settings.accumulate)
        with together(accelerator):
            if accelerator.is_main_process:
                pack_missing(config.data, arguments)
        finished = train(config, accelerator)
        part()
        accelerator.end_training()
        if not finished or trackers_hang():
            leave(0 if finished else INTERRUPTED)
        record_exit(0)


if __name__ == "__main__":
    main()
