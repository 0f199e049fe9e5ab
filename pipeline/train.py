"""The main job: `accelerate launch pipeline/train.py [--config FILE] [--section.key=value ...]`."""

# ruff: noqa: E402

import gc
import sys

from naign.errors import Outcome, exit_on_input_error
from naign.process import leave, leave_on_failure, leave_when_asked

if __name__ == "__main__":
    leave_when_asked()  # before imports of seconds: there is nothing to keep until training handles signals itself

gc.disable()  # Imports make no garbage, and collecting it would take a quarter of their time; train() enables it.

from naign.config import parse
from naign.distributed.connect import build_accelerator
from naign.distributed.host import keep_memory, set_threads
from naign.distributed.ranks import part, peers_missed, together
from naign.terminal import outlive_terminal
from naign.training.loop import train
from naign.training.setup import pack_missing


def main() -> None:
    outlive_terminal()
    arguments = sys.argv[1:]
    with leave_on_failure(), exit_on_input_error("train"), peers_missed():
        config = parse(arguments)
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
        if not finished:
            leave(Outcome.INTERRUPTED)


if __name__ == "__main__":
    main()
