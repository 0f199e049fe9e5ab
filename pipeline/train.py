"""The main job: `accelerate launch pipeline/train.py [--config FILE] [--section.key=value ...]`.

Exit codes: 0 done, 2 bad configuration or input, 75 stopped on request after a checkpoint, 76 another rank is gone,
anything else a crash.
"""

import ctypes
import gc
import os
import signal
import sys
import traceback
from pathlib import Path


def note(code: int) -> None:
    """Record this rank's exit code for `naign launch`."""
    if folder := os.environ.get("NAIGN_ENDINGS"):
        (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(str(code))


def leave(code: int) -> None:
    """End without interpreter shutdown, which aborts, and hides `code`, where a thread still waits for gloo's store."""
    note(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_launcher() -> None:
    """Have Linux kill this process when its launcher dies: nobody else ends a rank that imports or waits to connect.

    From the first round on, `StopRequest` takes the launcher's death for a SIGTERM instead.
    """
    launcher = int(os.environ.get("NAIGN_LAUNCHER", os.getppid()))
    if sys.platform != "linux" or "ACCELERATE_MIXED_PRECISION" not in os.environ or launcher == os.getpid():
        return  # started by hand, or `naign launch` became this process: the parent may well end first
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:  # it died before that call
        leave(75)


if __name__ == "__main__":
    end_with_launcher()
    _stops = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
    for _number in _stops:
        if _number != signal.SIGHUP or signal.getsignal(_number) != signal.SIG_IGN:  # which nohup has ignored
            signal.signal(_number, lambda *_: leave(75))  # there is nothing to keep until training listens itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _stops)  # blocked while `naign launch` became this process

# In a script sys.path starts with the script's own folder, where `data` or `match` would shadow libraries.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

# A quarter of the time that imports take would go into collecting garbage, of which they make none; train() enables it.
gc.disable()

# Before torch loads: its store and sockets log a stack of 20 lines for each rank that they lose.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# ruff: noqa: E402
from pipeline.config import parse
from pipeline.distributed import (
    build_accelerator,
    keep_memory,
    part,
    peers_missed,
    set_threads,
    together,
    warn_of_others,
)
from pipeline.errors import FAILED, INTERRUPTED, exit_on_input_error
from pipeline.observe import trackers_hang
from pipeline.storage.store import use_endpoint
from pipeline.terminal import outlive_terminal
from pipeline.training.loop import train
from pipeline.training.prepare import pack_missing


def main() -> None:
    outlive_terminal()
    try:
        run(sys.argv[1:])
    except SystemExit as error:
        if error.code:
            leave(error.code if isinstance(error.code, int) else FAILED)
    except BaseException:
        traceback.print_exc()
        leave(FAILED)


def run(arguments: list[str]) -> None:
    with exit_on_input_error("train"), peers_missed():
        config = parse(arguments)
        use_endpoint(config.data.endpoint)
        keep_memory()
        set_threads(config.train.threads)
        settings = config.train
        accelerator = build_accelerator(settings.timeout, precision=settings.precision, accumulate=settings.accumulate)
        with together(accelerator):
            if accelerator.is_main_process:
                pack_missing(config.data, arguments)
                if accelerator.device.type == "cpu":
                    warn_of_others()
        finished = train(config, accelerator)
        part()
        accelerator.end_training()
    if not finished:
        leave(INTERRUPTED)
    if accelerator.is_main_process:
        place = config.run.remote or config.run.path
        print(f"done: the run lies in {place}; measure it with: naign evaluate {place}")
    if trackers_hang():
        leave(0)
    note(0)


if __name__ == "__main__":
    main()
